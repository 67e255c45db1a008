"""Every law on every structure and on random nestings, one test for each pair."""

import pytest

from structured import circulant, parse, toeplitz
from structured.testing import LAWS, check
from tests.structured.specs import ALIASES, NESTINGS, SPECS


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("law", LAWS)
def test_law(law, spec):
    check(spec, laws=[law], sizes=SPECS[spec])


@pytest.mark.parametrize("law", LAWS)
def test_law_of_nestings(law):
    check(NESTINGS, laws=[law], examples=3 if law == "compiled" else None)


@pytest.mark.parametrize(
    ("spec", "module"),
    [("lower_toeplitz", toeplitz), ("upper_toeplitz", toeplitz), ("circulant", circulant)],
)
@pytest.mark.parametrize("law", [law for law in LAWS if law != "compiled"])
def test_law_by_fft(law, spec, module, monkeypatch):
    """The way of large sizes, at small ones."""
    monkeypatch.setattr(module, "_dense_is_faster", lambda n, m, dtype: False)
    check(spec, laws=[law])


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases(alias):
    assert parse(alias) == parse(ALIASES[alias])


def test_unknown_law():
    with pytest.raises(ValueError, match="expected one of the laws"):
        check("dense", laws=["grammar"])
