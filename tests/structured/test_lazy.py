"""Sums and products of any operators, and A A^T, against the dense matrix."""

import copy
import pickle

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch.utils import _pytree as pytree

from structured import Dense, Diagonal, Kronecker, Outer, Product, Sum, parse
from structured.interop import to_scipy
from structured.testing import assert_close
from tests.structured.test_kronecker import Reversal, member, normal

SPECS = ("dense", "diagonal", "lower_triangular", "circulant", "hierarchical(1, 1)")
BATCHES = ((), (2,), (3, 1))


@st.composite
def operators(draw, n):
    """A member, a user's operator, a Kronecker product, or a symmetric product."""
    kind = draw(st.sampled_from((*SPECS, "user", "kronecker", "outer")))
    if kind == "user":
        return Reversal(n)
    A = member(kind if kind in SPECS else "dense", n, draw(st.sampled_from(BATCHES)), seed=n)
    if kind == "kronecker":
        return Kronecker(A, member("diagonal", 1, (), seed=1))
    return A.outer() if kind == "outer" else A


parts = st.integers(0, 4).flatmap(lambda n: st.lists(operators(n), min_size=1, max_size=3))


def check(A, expected):
    """Every operation."""
    assert A.shape == expected.shape
    X, x = normal(A.n, 2), normal(A.n, seed=1)
    found = {
        "to_dense": (A.to_dense(), expected),
        "apply": (A @ X, expected @ X),
        "apply to a vector": (A @ x, expected @ x),
        "apply_transpose": (X.mT @ A, X.mT @ expected),
        "mT": (A.mT.to_dense(), expected.mT),
        "trace": (A.trace(), expected.diagonal(dim1=-2, dim2=-1).sum(-1)),
        "diagonal": (A.diagonal(), expected.diagonal(dim1=-2, dim2=-1)),
        "squared_rows": (A.squared_rows(), expected.square().sum(-1)),
        "frobenius_norm": (A.frobenius_norm(), torch.linalg.matrix_norm(expected)),
        "row": (A[..., :1, :], expected[..., :1, :]),
    }
    if A.n:
        found["spectral_norm"] = (A.spectral_norm(), torch.linalg.matrix_norm(expected, 2))
    for what, (mine, theirs) in found.items():
        assert_close(mine, theirs, what, 1e-10)


def check_inverse(A, expected):
    x = normal(A.n)
    assert_close(A.solve(x), torch.linalg.inv(expected) @ x, "solve", 1e-9)
    assert_close(A.solve(x[:, None]), torch.linalg.inv(expected) @ x[:, None], "solve", 1e-9)
    assert_close(A.logdet(), torch.linalg.slogdet(expected).logabsdet, "logdet", 1e-9)


@given(parts)
def test_sums(parts):
    expected = sum(A.to_dense() for A in parts)
    check(Sum(*parts), expected)
    eye = torch.eye(parts[0].n, dtype=torch.float64)
    shifted, within = Sum(Dense(16 * eye), *parts), expected + 16 * eye
    if (torch.linalg.matrix_norm(expected) < 8).all():  # far from singular
        check_inverse(shifted, within)


@given(parts)
def test_products(parts):
    expected = torch.eye(parts[0].n, dtype=torch.float64)
    for A in parts:
        expected = expected @ A.to_dense()
    check(Product(*parts), expected)
    check_inverse(Product(*parts), expected)


@given(st.integers(0, 4).flatmap(operators))
def test_symmetric_products(A):
    expected = A.to_dense() @ A.to_dense().mT
    check(Outer(A), expected)
    check_inverse(Outer(A), expected)
    assert Outer(A).mT.to_dense() is not None


A, C = member("lower_triangular", 3, (), 0), member("circulant", 3, (2,), 1)
K = Kronecker(Dense(normal(3, 3)))
P = member("hierarchical(1, 1)", 3, (2,), 2).outer()  # of a class of its own


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (K + A, K.to_dense() + A.to_dense()),
        (A + K, K.to_dense() + A.to_dense()),
        (A - K, A.to_dense() - K.to_dense()),
        (K - A, K.to_dense() - A.to_dense()),
        (K + K, 2 * K.to_dense()),
        (K @ A, K.to_dense() @ A.to_dense()),
        (A @ K, A.to_dense() @ K.to_dense()),
        (-Sum(A, C), -A.to_dense() - C.to_dense()),
        (Sum(A, C) / 2, (A.to_dense() + C.to_dense()) / 2),
        (3 * Product(A, C), 3 * A.to_dense() @ C.to_dense()),
        (A.outer() * 3, 3 * A.to_dense() @ A.to_dense().mT),
        (A.outer() + A, A.to_dense() @ A.to_dense().mT + A.to_dense()),
        (A.outer() @ A.outer(), torch.linalg.matrix_power(A.to_dense() @ A.to_dense().mT, 2)),
        (A.outer().inverse(), torch.linalg.inv(A.to_dense() @ A.to_dense().mT)),
        (Product(A, C).inverse(), torch.linalg.inv(A.to_dense() @ C.to_dense())),
        (P + A, P.to_dense() + A.to_dense()),
        (A + P, P.to_dense() + A.to_dense()),
        (P + P, 2 * P.to_dense()),
        (P - C, P.to_dense() - C.to_dense()),
        (C - P, C.to_dense() - P.to_dense()),
        (K - P, K.to_dense() - P.to_dense()),
        (P @ P, P.to_dense() @ P.to_dense()),
        (P @ A, P.to_dense() @ A.to_dense()),
        (A @ P, A.to_dense() @ P.to_dense()),
        (Kronecker(A, C).outer(), Kronecker(A, C).to_dense() @ Kronecker(A, C).to_dense().mT),
    ],
)
def test_operators_add_and_multiply(found, expected):
    assert_close(found.to_dense(), expected, "operator", 1e-10)


def test_the_product_with_the_own_transpose_is_symmetric():
    L, U = (parse(f"{half}_triangular").randn(4) for half in ("lower", "upper"))
    assert isinstance(L @ L.mT, Outer)
    assert isinstance(L.mT @ L, Outer)
    assert isinstance(L @ U, Product)
    assert isinstance(L @ L.clone().mT, Product)
    nested = parse("tied(2, block_lower(dense, diagonal, 1))").randn(4)
    assert isinstance(nested @ nested.mT, Outer)
    assert isinstance(Dense(torch.ones(2, 2)) @ Dense(torch.ones(2, 2)).mT, Dense)
    compiled = torch.compile(lambda A: torch.ones(1, 4) @ A.matmul(A).to_dense(), backend="eager")
    assert compiled(L).shape == (1, 4)


def test_sums_of_sums_are_flat():
    assert len(Sum(Sum(A, C), A, Sum(K)).parts) == 4
    assert len(Product(Product(A, C), A).parts) == 3


@pytest.mark.parametrize("make", [lambda: Sum(A, C), lambda: Product(A, C), lambda: A.outer()])
def test_they_are_kept_moved_and_differentiated(make):
    P = make()
    for again in (
        copy.deepcopy(P),
        pickle.loads(pickle.dumps(P)),
        P.clone(),
        pytree.tree_map(torch.clone, P),
    ):
        assert torch.equal(again.to_dense(), P.to_dense())
    assert P.half().dtype == torch.float16
    assert P.numel() == sum(t.numel() for t in P.tensors())
    leaves = [t.clone().requires_grad_() for t in P.tensors()]
    X = normal(3, 2)
    assert torch.autograd.gradcheck(lambda *t: P.with_tensors(t).apply(X), leaves)


def test_scipy_sees_them():
    x = normal(3)
    assert_close(torch.from_numpy(to_scipy(A.outer()).matvec(x.numpy())), A.outer() @ x, "matvec")


OPERATORS = {
    "sum": Sum(A, C),
    "product": Product(A, C),
    "outer": A.outer(),
    "arrow": P,
    "sum of arrows": Sum(A, P, P),
    "mixed": Product(Sum(A.outer(), Kronecker(A)), C, P),
    "kronecker": Kronecker(A),
    "one by one": Sum(*[Diagonal(torch.ones(1, dtype=torch.float64))] * 2),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("operation", ["apply", "apply_transpose", "solve"])
def test_all_operators_check_what_they_multiply_and_solve(name, operation):
    P = OPERATORS[name]
    run = getattr(P, operation)
    of = f"{type(P).__name__}.{operation}: expected "
    for wrong in (normal(P.n + 1, 1), normal(4, P.n + 2, 2)):
        with pytest.raises(ValueError, match=rf"{of}shape \[..., {P.n}, m\], got"):
            run(wrong)
    with pytest.raises(ValueError, match=f"{of}torch.float64 on cpu, got torch.float32 on cpu"):
        run(normal(P.n, 1).float())
    with pytest.raises(TypeError, match=f"{of}a tensor, got list"):
        run([1.0])
    if P.batch_shape:
        with pytest.raises(ValueError, match=f"{of}a batch shape that broadcasts with"):
            run(normal(5, P.n, 1))


@pytest.mark.parametrize("name", OPERATORS)
def test_multiples_are_those_of_the_matrix(name):
    """By numbers and by tensors, of every part's batch shape or of that of the whole."""
    P = OPERATORS[name]
    dense, shape = P.to_dense(), P.batch_shape
    tensors = torch.tensor(3), torch.tensor(-3.0), 1 + torch.arange(float(shape.numel()))
    for c in (2, -0.5, 0.0, *tensors[:2], tensors[2].double().reshape(shape)):
        trailing = c[..., None, None] if isinstance(c, torch.Tensor) else c
        for found in (c * P, P * c):
            assert_close(found.to_dense(), trailing * dense, "multiple", 1e-12)
        if isinstance(c, torch.Tensor) or c:
            assert_close((P / c).to_dense(), dense / trailing, "quotient", 1e-12)
        assert (c * P).dtype == P.dtype
    assert_close((-P).to_dense(), -dense, "negative", 1e-12)
    assert not torch.isfinite((P / 0).to_dense()).all()
    for wrong in (normal(*shape, 2), 1j, "2"):
        with pytest.raises((TypeError, ValueError), match=r"unsupported|a scalar|sequence"):
            _ = P * wrong


@pytest.mark.parametrize(
    "P", [*OPERATORS.values(), Reversal(3), Reversal(1)], ids=lambda P: type(P).__name__
)
def test_all_operators_solve_for_vectors(P):
    x = normal(P.n)
    assert_close(P.solve(x), P.solve(x[:, None])[..., 0], "solve", 1e-12)
    assert_close(P @ P.solve(x[:, None]), x[:, None].expand(*P.batch_shape, -1, -1), "solve", 1e-9)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (lambda: Sum(), "Sum: expected at least one operator, got none"),
        (lambda: Sum(A, 2), "Sum: expected operators, got int"),
        (lambda: Product(A, Diagonal(normal(2))), r"Product: expected operators of one size, got"),
        (lambda: Sum(A, A.float()), "Sum: expected operators of one dtype and device"),
        (
            lambda: Sum(C, C.expand(3, 2)[:, :1].expand(3, 3)),
            "expected batch shapes that broadcast",
        ),
        (lambda: Sum(A, C).apply(normal(4, 1)), r"Sum.apply: expected shape \[..., 3, m\], got"),
        (lambda: A.outer().solve(normal(4)), r"Outer.solve: expected shape \[..., 3, m\], got"),
        (lambda: A + C, r"^\+: expected two members .*; Sum\(A, B\) is an operator"),
        (lambda: A @ C, r"matmul: expected two members .*; Product\(A, B\) is an operator"),
        (lambda: K - Reversal(3), "unsupported operand"),
        (lambda: K + 1, "unsupported operand"),
        (lambda: Sum(A, C) * C, "unsupported operand"),
    ],
)
def test_what_makes_no_sense(wrong, error):
    with pytest.raises((TypeError, ValueError), match=error):
        wrong()
