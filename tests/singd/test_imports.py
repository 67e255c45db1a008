"""The two packages meet only in the public names of ``structured``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import singd
import structured
import structured.kernels
from tests import imports

TREES = imports.trees(singd)
ORDER = (  # the lowest first
    *("update", "ops", "layers", "capture", "methods", "placement", "step", "state"),
    *("diagnostics", "passes", "optimizer", "singd", "kfac", "convert", "choice", "factors"),
    *("", "testing"),
)
FILES = sorted(Path(singd.__file__).parent.rglob("*.py"))
PUBLIC = {m.__name__: m.__all__ for m in (structured, structured.kernels)}


def names_from(path: Path) -> Iterator[tuple[str, str | None]]:
    """Modules imported, with the names taken from them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)


def test_imports_run_one_way() -> None:
    assert imports.upward(TREES, ORDER) == []
    assert imports.circle(TREES) == []
    assert imports.hidden(TREES) == []
    assert imports.private(TREES) == []


def test_the_import_adds_little_to_that_of_torch() -> None:
    assert imports.loaded_by("singd") == {"singd", "structured"}


def test_the_parts_of_a_step_know_no_optimizer() -> None:
    """Only the shell, and functions that users call with an optimizer, take one."""
    for name, tree in TREES.items():
        if name.split(".")[1:2] in (["testing"], ["convert"], ["factors"]):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                taken = [a.arg for a in (*node.args.args, *node.args.kwonlyargs)]
                assert "optimizer" not in taken, f"{name}: {node.name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_singd_uses_public_names_of_structured(path: Path) -> None:
    for module, name in names_from(path):
        if module.split(".")[0] == "structured":
            public = PUBLIC.get(module, [])
            assert name in public, f"{path.name} imports {name} from {module}"


def test_every_public_name_exists() -> None:
    assert len(FILES) > 5
    for package in (singd, structured):
        assert all(hasattr(package, name) for name in package.__all__)


def test_files_are_short() -> None:
    long = {str(path): len(path.read_text().splitlines()) for path in FILES}
    assert {name: n for name, n in long.items() if n > 300} == {}
