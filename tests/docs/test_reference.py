"""The API reference has every exported name once, and says what structures store."""

from __future__ import annotations

import re
from types import ModuleType

import pytest

import singd
import structured
from docs import reference
from structured import StructuredMatrix

STRUCTURES = [
    thing
    for thing in (getattr(structured, name) for name in structured.__all__)
    if isinstance(thing, type)
    and issubclass(thing, StructuredMatrix)
    and thing is not StructuredMatrix
]


@pytest.mark.parametrize("package", [structured, singd], ids=lambda package: package.__name__)
def test_every_exported_name_is_there_once(package: ModuleType) -> None:
    pattern = rf"^\.\. (?!automodule)\S+:: {package.__name__}\.(\w+)$"
    found = re.findall(pattern, reference.page(package), re.M)
    assert sorted([*found, "__version__"]) == sorted(package.__all__)


def test_a_name_in_no_group_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "SINGD", {"Optimizers": ("KFAC",)})
    text = reference.page(singd)
    assert text.index("singd.KFAC") < text.index("More\n----") < text.index("singd.SINGD")


def test_every_member_of_the_base_class_is_in_one_group() -> None:
    found = [name for names in reference.members().values() for name in names]
    assert len(found) == len(set(found))
    assert {"zeros", "to_dense", "apply", "identity", "dtype", "n"} <= set(found)
    assert all(hasattr(StructuredMatrix, name) for name in found)


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda structure: structure.__name__)
def test_every_field_has_its_shape_or_is_an_argument(structure: type[StructuredMatrix]) -> None:
    fields, text = dict(reference.shapes(structure)), structure.__doc__ or ""
    assert fields
    for name, comment in fields.items():
        assert comment or f"\n        {name}: " in text, name
