"""Costs without a clock: elements written and multiplied while n doubles, on the meta device."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from structured import circulant, cost, costs, parse, toeplitz
from tests.structured.specs import SPECS

SIZE, COLUMNS = 4096, 4
LINEAR = 1.02
LOGARITHMIC = 1.02 + math.log2(math.log2(SIZE / 2) / math.log2(SIZE / 4))  # n log n, in 4 parts

SUBSTITUTION = 1.35  # n log^2 n, from the size on where there are halves

EXPONENTS = {
    "diagonal": LINEAR,
    "scaled_identity": LINEAR,
    "block_diagonal(4)": LINEAR,
    "hierarchical(2, 3)": LINEAR,
    "low_rank_upper(2)": LINEAR,
    "low_rank_upper(-2)": LINEAR,
    "low_rank_lower(2)": LINEAR,
    "low_rank_lower(-2)": LINEAR,
    "transposed(low_rank_lower(2))": LINEAR,
    "transposed(hierarchical(2, 3))": LINEAR,
    "lower_toeplitz": LOGARITHMIC,
    "upper_toeplitz": LOGARITHMIC,
    "circulant": LOGARITHMIC,
    "block_circulant(4)": LOGARITHMIC,
    "block_upper(dense, lower_toeplitz, 4)": LOGARITHMIC,
    "direct_sum(dense, lower_toeplitz, 4)": LOGARITHMIC,
    "tied(4, upper_toeplitz)": LOGARITHMIC,
    "strided(4, circulant)": LOGARITHMIC,
    "rotated(diagonal, hadamard)": LOGARITHMIC,
    "rotated(diagonal, cosine)": LOGARITHMIC,
}


def numbers(P):
    """What a symmetric product is asked for."""
    return P.diagonal(), P.trace(), P.logdet()


OPERATIONS = {
    "apply": lambda A, X, S: A.apply(X),
    "apply_transpose": lambda A, X, S: A.apply_transpose(X),
    "matmul": lambda A, X, S: A.matmul(A),
    "project_gram": lambda A, X, S: A.project_gram(X),
    "orthogonal_project_gram": lambda A, X, S: A.orthogonal_project_gram(X),
    "gram": lambda A, X, S: A.gram(),
    "outer": lambda A, X, S: A.outer().apply(X),
    "outer, its numbers": lambda A, X, S: numbers(A.outer()),
    "outer, solved": lambda A, X, S: A.outer().solve(X),
    "trace": lambda A, X, S: A.trace(),
    "add_scaled_identity": lambda A, X, S: A.add_scaled_identity(1.0),
    "solve": lambda A, X, S: A.solve(X),
    "inverse": lambda A, X, S: A.inverse(),
    "solve_member": lambda A, X, S: A.solve_member(A),
    "exp": lambda A, X, S: A.exp(),
    "diagonal": lambda A, X, S: A.diagonal(),
    "spectral_norm": lambda A, X, S: A.spectral_norm(),
    "entry": lambda A, X, S: A[..., 1, -1],
    "power": lambda A, X, S: A**5,
    "logdet": lambda A, X, S: A.logdet(),
    "frobenius_norm": lambda A, X, S: A.frobenius_norm(),
    "add": lambda A, X, S: A + A,
    "project": lambda A, X, S: A.project(S),
}


OF_INVERSES = ("solve", "outer, solved", "solve_member", "inverse")


class Meter(TorchDispatchMode):
    """Counts elements written, multiplications in matrix products, and the largest tensor."""

    def __init__(self):
        super().__init__()
        self.work = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor):
                stored = t.untyped_storage().nbytes() // t.element_size()
                self.largest = max(self.largest, stored)
                inner = args[-2].shape[-1] if "mm" in func.__name__ else 1
                length = t.shape[-1] if "fft" in func.__name__ else 1
                self.work += t.numel() * inner * max(1, math.log2(max(length, 1)))
        return result


def measure(spec, operation, n):
    A = parse(spec)(n, device="meta")
    X, S = torch.empty(n, COLUMNS, device="meta"), torch.empty(n, n, device="meta")
    with Meter() as meter:
        OPERATIONS[operation](A, X, S)
    return meter


def stored(spec, n):
    return sum(t.numel() for t in parse(spec)(n, device="meta").tensors())


# What has no fast way, but through the dense matrix.
DENSE = {
    "diagonal": ("rotated",),
    "outer, its numbers": ("rotated",),
    "spectral_norm": ("hierarchical", "low_rank", "toeplitz"),
}


@pytest.mark.parametrize("spec", EXPONENTS)
@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "project"])
def test_growth(operation, spec):
    once, twice = (measure(spec, operation, n) for n in (SIZE, 2 * SIZE))
    if any(word in spec for word in DENSE.get(operation, ())):
        assert math.log2(twice.largest / once.largest) > 1.9
        return
    for before, after in ((once.work, twice.work), (once.largest, twice.largest)):
        growth = math.log2(max(after, 1) / max(before, 1))
        halves = operation in OF_INVERSES and "toeplitz" in spec
        bound = SUBSTITUTION if halves else EXPONENTS[spec]
        assert growth <= bound, f"{before} at {SIZE}, {after} at {2 * SIZE}"


@pytest.mark.parametrize("spec", EXPONENTS)
def test_storage(spec):
    growth = math.log2(stored(spec, 2 * SIZE) / stored(spec, SIZE))
    assert growth <= LINEAR


@pytest.mark.parametrize("spec", EXPONENTS)
def test_projection_of_a_matrix(spec):
    """``project`` reads n^2 numbers; nothing that it writes is much larger."""
    assert measure(spec, "project", SIZE).largest <= 2.1 * SIZE**2


@pytest.mark.parametrize(
    ("faster", "n", "columns", "dtype", "expected"),
    [
        (toeplitz._dense_is_faster, 64, 1, torch.float32, True),
        (toeplitz._dense_is_faster, 512, 16, torch.float32, True),
        (toeplitz._dense_is_faster, 512, 15, torch.float32, False),
        (toeplitz._dense_is_faster, 513, 17, torch.float32, False),
        (toeplitz._dense_is_faster, 900, 900, torch.float32, True),
        (toeplitz._dense_is_faster, 900, 250, torch.float32, False),
        (toeplitz._dense_is_faster, 900, 250, torch.bfloat16, True),
        (toeplitz._dense_is_faster, 1800, 1800, torch.float32, False),
        (toeplitz._dense_is_faster, 1800, 1800, torch.bfloat16, True),
        (toeplitz._dense_is_faster, 1800, 100, torch.bfloat16, False),
        (toeplitz._dense_is_faster, 4096, 99999, torch.bfloat16, False),
        *(
            (function, *case)
            for function in (toeplitz._gram_is_faster, circulant._dense_is_faster)
            for case in [
                (32, 1, torch.float32, True),
                (512, 4096, torch.float32, False),
                (512, 1024, torch.bfloat16, True),
                (512, 64, torch.bfloat16, False),
                (4096, 99999, torch.bfloat16, False),
            ]
        ),
    ],
)
def test_dense_products_where_they_are_faster(faster, n, columns, dtype, expected):
    """At small sizes, for many columns and in 16 bits, as measured."""
    assert faster(n, columns, dtype) is expected


@pytest.mark.parametrize(
    ("n", "dtype", "size"),
    [
        (0, torch.float32, 1),
        (300, torch.float32, 300),
        (1000, torch.float32, 143),
        (1024, torch.float64, 128),
        (1024, torch.bfloat16, 1024),
    ],
)
def test_blocks_of_toeplitz_products(n, dtype, size):
    assert toeplitz._block_size(n, dtype) == size


def test_the_meter_sees_a_square():
    """Dense and triangular matrices are what the others avoid."""
    for operation in ("apply", "matmul", "gram"):
        once, twice = (measure("dense", operation, n) for n in (SIZE, 2 * SIZE))
        assert math.log2(twice.work / once.work) > 1.9


def test_every_structure_has_its_exponent():
    """But those whose part is dense or triangular."""
    words = {spec.split("(")[0] for spec in SPECS}
    assert words - {spec.split("(")[0] for spec in EXPONENTS} == {
        "dense",
        "lower_triangular",
        "upper_triangular",
        "block_lower",
    }


# The counts of the package -------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_every_structure_has_a_cost(spec):
    n = 24
    found, A = cost(spec, n, columns=3), parse(spec)(n)
    assert found.numbers == sum(t.numel() for t in A.tensors())
    assert found.bytes == sum(t.nbytes for t in A.tensors())
    assert set(found) == set(costs.OPERATIONS)
    for name, operation in found.items():
        assert operation.multiply_adds >= 0, name
        assert operation.bytes >= 0, name


def test_counts_of_dense_operations_are_the_formulas():
    n, m = 50, 7
    found = cost("dense", n, columns=m, dtype=torch.float64)
    assert found["apply"] == costs.OperationCost(n * n * m, 8 * (n * n + 2 * n * m))
    assert found["matmul"].multiply_adds == n**3
    assert found["project_gram"].multiply_adds == n * n * m
    assert found.bytes == 8 * n * n


def test_counts_of_decompositions_and_solves_are_the_formulas():
    n, m = 200, 3000
    found, A = cost("dense", n, columns=m), parse("dense")(n, device="meta")
    assert found["solve"].multiply_adds == pytest.approx(n**3 + n * n * m, rel=0.01)
    assert found["logdet"].multiply_adds == pytest.approx(n**3, rel=0.02)
    for operation in ("inverse", "exp", "spectral_norm"):
        cubic = costs.operation_cost(lambda A, X, name=operation: getattr(A, name)(), A)
        assert cubic.multiply_adds == pytest.approx(n**3, rel=0.02), operation
    L, X = torch.empty(n, n, device="meta"), torch.empty(4, n, m, device="meta")
    for share, function in (
        (0.5, lambda: torch.linalg.solve_triangular(L, X, upper=False)),
        (0.5, lambda: torch.linalg.solve_triangular(L, X.mT, upper=False, left=False)),
        (1.0, lambda: torch.cholesky_solve(X, L)),
    ):
        assert costs.cost_of(function).multiply_adds == share * n * n * m * 4
    assert costs.cost_of(lambda: torch.linalg.qr(X.mT)).multiply_adds == n * n * m * 4
    assert costs.cost_of(lambda: torch.linalg.svdvals(X)).multiply_adds <= n * n * m * 4 + m * n * 4


@pytest.mark.parametrize("spec", ["lower_triangular", "upper_triangular"])
def test_half_a_matrix_is_solved_at_half_the_cost(spec):
    n, m = 1000, 64
    assert cost(spec, n, columns=m)["solve"].multiply_adds == pytest.approx(n * n * m / 2, rel=0.15)


@given(blocks=st.integers(1, 9), k=st.integers(1, 9), m=st.integers(1, 9))
def test_blocks_cost_the_sum_of_theirs(blocks, k, m):
    whole, one = cost(f"block_diagonal({k})", blocks * k, columns=m), cost("dense", k, columns=m)
    for name in ("apply", "apply_transpose", "matmul"):
        assert whole[name].multiply_adds == blocks * one[name].multiply_adds


def test_what_is_counted_is_what_runs():
    """On the meta device and with data alike, beyond the sizes that have ways of their own."""
    for spec in ("lower_toeplitz", "hierarchical(2, 3)", "lower_triangular"):
        with_data = parse(spec).identity(96)
        for name in ("apply", "matmul", "gram"):
            counted = cost(spec, 96, columns=5)[name]
            assert costs.operation_cost(costs.OPERATIONS[name], with_data, 5) == counted


def test_errors_of_costs():
    with pytest.raises(ValueError, match="cost: expected n and columns >= 0, got -1 and 1"):
        cost("dense", -1)
    with pytest.raises(ValueError, match="dens"):
        cost("dens", 4)
