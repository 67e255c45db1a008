"""Every law on every structure and on random nestings, one test for each pair."""

import pytest

from structured import block_circulant, circulant, parse, rotated, toeplitz
from structured._products import gram, in_place
from structured._products import triangular as triangular_products
from structured._transforms import autocorrelation, cosine, folded, hadamard
from structured.testing import LAWS, check
from tests.structured.specs import (
    ALIASES,
    COMPILED,
    COMPILING,
    NESTINGS,
    OF_EVERY_OPERATION,
    SPECS,
    cases,
)

RUN = [law for law in LAWS if law not in COMPILING]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("law", RUN)
def test_law(law, spec):
    check(spec, laws=[law], sizes=SPECS[spec], examples=cases(law))


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec in COMPILED])
@pytest.mark.parametrize("law", COMPILING)
def test_law_of_compiling(law, spec):
    check(spec, laws=[law], sizes=SPECS[spec])


def test_one_of_each_class_is_compiled():
    classes = {spec: type(parse(spec)(12)) for spec in SPECS}
    assert {classes[spec] for spec in COMPILED} == {*classes.values()}


@pytest.mark.parametrize("law", LAWS)
def test_law_of_nestings(law):
    few = 2 if law in COMPILING else 8 if law in OF_EVERY_OPERATION else None
    check(NESTINGS, laws=[law], examples=few)


def never(n, m, dtype):
    return False


# The ways of large sizes, at small ones: a spec, its module, what decides, and how.
BY_FFT = [
    ("lower_toeplitz", toeplitz, "_dense_is_faster", never),
    ("upper_toeplitz", toeplitz, "_dense_is_faster", never),
    ("circulant", circulant, "_dense_is_faster", never),
    ("block_circulant(2)", block_circulant, "_BY_PRODUCT", 0),
    ("rotated(diagonal, cosine)", cosine, "_LARGEST", (0, 1)),
]
BY_BLOCKS = [
    ("lower_toeplitz", toeplitz, "_block_size", lambda n, dtype: 2),
    ("upper_toeplitz", toeplitz, "_block_size", lambda n, dtype: 1),
    ("lower_triangular", triangular_products, "_LEAF", 1),
    ("upper_triangular", triangular_products, "_LEAF", 1),
    ("upper_toeplitz", toeplitz, "_gram_is_faster", never),
    ("lower_triangular", triangular_products, "_PANEL", 1),
    ("upper_triangular", triangular_products, "_PANEL", 2),
    ("rotated(diagonal, cosine)", cosine, "_LARGEST", (12, 2)),
    ("rotated(diagonal, cosine)", rotated, "_COLUMNS", 1),
    ("rotated(lower_triangular, hadamard)", rotated, "_COLUMNS", 2),
    ("rotated(lower_triangular, hadamard)", hadamard, "_LARGEST", 2),
    ("block_diagonal(2)", in_place, "_PANEL", 64),
    ("tied(3, block_diagonal(2))", in_place, "_PANEL", 64),
    ("block_diagonal(2)", in_place, "_LARGE", 1),
    ("hierarchical(2, 3)", in_place, "_LARGE", 1),
    ("lower_triangular", in_place, "_LARGE", 1),
    ("dense", gram, "_panels_pay", lambda X: X.is_cpu and X.shape[-2] > 0),
    ("direct_sum(dense, diagonal, 5)", gram, "_panels_pay", lambda X: X.is_cpu and X.shape[-2] > 0),
    ("diagonal", gram, "_norms_pay", lambda X: not X.requires_grad),
    ("hierarchical(2, 3)", gram, "_norms_pay", lambda X: not X.requires_grad),
    ("lower_toeplitz", autocorrelation, "_FEWEST", 1),
    ("circulant", autocorrelation, "_FEWEST", 1),
]
OF_PRODUCTS = (
    *("product", "apply", "apply_transpose", "gram", "solve", "batches"),
    *("apply_overwriting", "apply_rows", "solve_transpose"),
    *("project_gram", "orthogonal_project_gram"),
    *("backward", "forward", "mapped", "autocast"),
)
MADE_OF_PRODUCTS = (
    *OF_PRODUCTS,
    *("inverse", "division", "powers", "exponential", "congruence", "outer", "stationarity"),
    *("project_trace", "trace_product", "spectral_norm", "logdet", "stable_solve", "singular"),
    *("batch_shapes", "fresh", "precision", "gradients", "meta", "deterministic", "large"),
)


@pytest.mark.parametrize("way", BY_FFT, ids=lambda way: way[0])
@pytest.mark.parametrize("law", MADE_OF_PRODUCTS)
def test_law_by_fft(law, way, monkeypatch):
    spec, *decision = way
    monkeypatch.setattr(*decision)
    check(spec, laws=[law], sizes=SPECS[spec], examples=cases(law))


@pytest.mark.parametrize("way", BY_BLOCKS, ids=lambda way: f"{way[0]}-{way[2]}")
@pytest.mark.parametrize("law", OF_PRODUCTS)
def test_law_by_blocks(law, way, monkeypatch):
    spec, *decision = way
    monkeypatch.setattr(folded, "SMALL", 0)
    monkeypatch.setattr(*decision)
    check(
        spec,
        laws=[law],
        sizes=range(0, 13, 6) if "tied" in spec else range(13),
        examples=cases(law),
    )


@pytest.mark.parametrize("spec", ["lower_triangular", "upper_triangular"])
@pytest.mark.parametrize("law", MADE_OF_PRODUCTS)
def test_law_of_large_triangles(law, spec, monkeypatch):
    """Small ones are multiplied as dense matrices."""
    monkeypatch.setattr(folded, "SMALL", 0)
    check(spec, laws=[law], sizes=SPECS[spec], examples=cases(law))


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases(alias):
    assert parse(alias) == parse(ALIASES[alias])


def test_unknown_law():
    with pytest.raises(ValueError, match="expected one of the laws"):
        check("dense", laws=["grammar"])


@pytest.mark.parametrize("examples", [0, -1, 2.5])
def test_number_of_cases(examples):
    with pytest.raises(ValueError, match="examples: expected a number of cases from 1 on"):
        check("dense", examples=examples)
