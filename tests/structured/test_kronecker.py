"""Kronecker products of any operators against the dense matrix, written out entry by entry."""

import copy
import functools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.utils import _pytree as pytree

from structured import Dense, Diagonal, Kronecker, Operator, Rotated, StructuredMatrix, parse
from structured.interop import to_linear_operator, to_root_linear_operator, to_scipy
from structured.testing import assert_close

SPECS = (
    "dense",
    "diagonal",
    "lower_triangular",
    "upper_toeplitz",
    "circulant",
    "hierarchical(1, 1)",
    "scaled_identity",
    "transposed(low_rank_lower(1))",
)
BATCHES = ((), (2,), (1,), (3, 1), (3, 2))  # any two broadcast


class Reversal(Operator):
    """A user's operator: the order of the rows turned round, known by its products alone."""

    def __init__(self, n):
        self.size = n

    shape = property(lambda self: torch.Size((self.size, self.size)))
    dtype = property(lambda self: torch.float64)
    device = property(lambda self: torch.device("cpu"))
    mT = property(lambda self: self)  # as of tensors

    def apply(self, X):
        return X.flip(-2)

    apply_transpose = apply

    def to_dense(self):
        return torch.eye(self.size, dtype=self.dtype).flip(-2)


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def member(spec, n, batch, seed):
    """Well conditioned, and not symmetric."""
    zero = parse(spec)(n, batch_shape=batch, dtype=torch.float64)
    noise = zero.map(lambda t: normal(*t.shape, seed=seed))
    return (noise / (2 + noise.frobenius_norm())).add_scaled_identity(1.0)


@st.composite
def factors(draw, sizes=None, users=True):
    """One to three factors, and now and then a user's operator or a product among them."""
    sizes = sizes or draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
    made = []
    for seed, n in enumerate(sizes):
        kind = draw(st.sampled_from((*SPECS, "user", "product") if users else SPECS))
        if kind == "user":
            made.append(Reversal(n))
        elif kind == "product":
            scale = member("diagonal", 1, draw(st.sampled_from(BATCHES)), seed)
            made.append(Kronecker(member("dense", n, (), seed), scale))
        else:
            made.append(member(kind, n, draw(st.sampled_from(BATCHES)), seed + 7))
    return made


products = factors().map(lambda parts: Kronecker(*parts))
records = factors(users=False).map(lambda parts: Kronecker(*parts))
by_products = given(P=products)


def written_out(parts):
    """``M_ij`` is the product of the entries that the digits of i and j pick, batch by batch."""
    batch = torch.broadcast_shapes(*(A.batch_shape for A in parts))
    count = math.prod(batch)
    dense = [A.to_dense().expand(*batch, A.n, A.n).reshape(count, A.n, A.n) for A in parts]
    kron = [functools.reduce(torch.kron, [M[i].contiguous() for M in dense]) for i in range(count)]
    n = math.prod(A.n for A in parts)
    empty = torch.zeros(0, n, n, dtype=torch.float64)
    return torch.stack(kron or [empty]).reshape(*batch, n, n)


@by_products
def test_it_is_the_product(P):
    dense = written_out(P.factors)
    assert P.shape == dense.shape
    assert P.dtype == torch.float64
    assert_close(P.to_dense(), dense, "to_dense")
    assert_close(P.mT.to_dense(), dense.mT, "mT")


@given(P=products, m=st.integers(0, 3), batch=st.sampled_from(BATCHES))
def test_products_and_solves(P, m, batch):
    dense, X = written_out(P.factors), normal(*batch, P.n, m)
    assert_close(P.apply(X), dense @ X, "apply")
    assert_close(P.apply_transpose(X), dense.mT @ X, "apply_transpose")
    assert_close(X.mT @ P, X.mT @ dense, "X @ P")
    inverse = torch.linalg.inv(dense)
    assert_close(P.solve(X), inverse @ X, "solve", 1e-10)
    assert_close(P.inverse().to_dense(), inverse, "inverse", 1e-10)
    x = normal(P.n)
    assert_close(P @ x, dense @ x, "P @ x")
    assert_close(P.solve(x), inverse @ x, "solve(x)", 1e-10)


@by_products
def test_numbers(P):
    dense = written_out(P.factors)
    padded = torch.nn.functional.pad(dense, (0, 1, 0, 1))
    diagonal = dense.diagonal(dim1=-2, dim2=-1)
    assert_close(P.trace(), diagonal.sum(-1), "trace")
    assert_close(P.diagonal(), diagonal, "diagonal")
    assert_close(P.logdet(), torch.linalg.slogdet(dense).logabsdet, "logdet", 1e-10)
    assert_close(P.frobenius_norm(), dense.square().sum((-2, -1)).sqrt(), "frobenius_norm")
    assert_close(P.max_abs(), padded.abs().amax((-2, -1)), "max_abs")


@given(P=products, c=st.sampled_from((2, -0.5, "scalar", "batch")))
def test_scaling(P, c):
    dense = written_out(P.factors)
    if isinstance(c, str):
        c = normal(*(P.batch_shape if c == "batch" else ()), seed=9)
    factor = c[..., None, None] if isinstance(c, Tensor) and c.ndim else c
    for scaled in (c * P, P * c):
        assert isinstance(scaled, Kronecker)
        assert_close(scaled.to_dense(), factor * dense, "c * P")
    assert_close((P / c).to_dense(), dense / factor, "P / c")
    assert_close((-P).to_dense(), -dense, "-P")


@given(data=st.data())
def test_products_of_two(data):
    first = data.draw(factors())
    second = data.draw(factors([A.n for A in first]))
    product = Kronecker(*first) @ Kronecker(*second)
    assert isinstance(product, Kronecker)
    assert_close(product.to_dense(), written_out(first) @ written_out(second), "P @ Q")


@given(P=records, alpha=st.sampled_from((0.5, "scalar", "batch")))
def test_plus_a_multiple_of_the_identity(P, alpha):
    P = Kronecker(*(Dense(A.to_dense() @ A.to_dense().mT) for A in P.factors))
    if isinstance(alpha, str):
        alpha = normal(*(P.batch_shape if alpha == "batch" else ()), seed=9).abs() + 0.5
    shift = alpha[..., None, None] if isinstance(alpha, Tensor) and alpha.ndim else alpha
    dense = P.to_dense() + shift * torch.eye(P.n, dtype=P.dtype)
    shifted, X = P.add_scaled_identity(alpha), normal(P.n, 2)
    assert_close(shifted, dense, "P + alpha I", 1e-10)
    assert_close(shifted.apply(X), dense @ X, "(P + alpha I) X", 1e-10)
    assert_close(shifted.solve(X), torch.linalg.solve(dense, X.expand(*P.shape[:-1], 2)), "s", 1e-9)
    assert_close(shifted.logdet(), torch.linalg.slogdet(dense).logabsdet, "logdet", 1e-10)
    assert shifted.to(torch.float32).Q.dtype == torch.float32


@settings(max_examples=10)
@given(P=records)
def test_gradients_reach_every_factor(P):
    X = normal(P.n, 2)
    tensors = [t.clone().requires_grad_() for t in P.tensors()]

    def everything(*tensors):
        P_ = P.with_tensors(tensors)
        results = (
            P_ @ X,
            P_.solve(X),
            P_.inverse().to_dense(),
            P_.diagonal(),
            (P_ @ P_).to_dense(),
        )
        numbers = (P_.trace(), P_.logdet(), P_.frobenius_norm())
        return torch.cat([t.flatten() for t in (*results, *numbers)]) + 0 * sum(
            t.sum() for t in tensors
        )

    if P.n:
        assert torch.autograd.gradcheck(everything, tensors, fast_mode=True)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of tril_, in triangular ones
@pytest.mark.parametrize("spec", SPECS)
def test_vmap_over_either_factor(spec):
    many, one, X = member(spec, 3, (5,), 0), member(spec, 2, (), 1), normal(6, 2)
    for parts in ((many, one), (one, many)):
        P = Kronecker(*parts)

        def compute(*parts):
            Q = Kronecker(*parts)
            return Q @ X, Q.solve(X), Q.logdet()

        found = torch.vmap(compute, in_dims=tuple(0 if A is many else None for A in parts))(*parts)
        for actual, expected in zip(found, (P @ X, P.solve(X), P.logdet()), strict=True):
            assert_close(actual, expected, "vmap", 1e-10)
    P = Kronecker(many, many)
    found = torch.vmap(lambda Q: Q.trace())(P)  # a pytree of its tensors
    assert_close(found, P.trace(), "vmap over a product", 1e-10)


@given(P=records)
def test_copies(P):
    leaves, spec = pytree.tree_flatten(P)
    assert [id(t) for t in leaves] == [id(t) for t in P.tensors()]
    dense = P.to_dense()
    for again in (pytree.tree_unflatten(leaves, spec), P.clone(), P.detach(), copy.deepcopy(P)):
        assert type(again) is Kronecker
        assert_close(again.to_dense(), dense, "a copy")
    low = P.to(torch.float32)
    assert low.dtype == torch.float32
    assert_close(low.to_dense().double(), dense, "to(float32)", 1e-5)
    wide = P.expand(4, *P.batch_shape)
    assert_close(wide.to_dense(), dense.expand(4, *dense.shape), "expand")
    doubled = P.map(lambda t: 2 * t)
    assert_close(doubled.to_dense(), 2 ** len(P.factors) * dense, "map")


@pytest.mark.parametrize("batch", [(), (2,), (3, 2)], ids=str)
def test_samples_have_the_covariance(batch):
    """``P`` is recovered from samples as a product of the very numbers that were drawn."""
    P = Kronecker(member("dense", 3, batch, 0), member("lower_triangular", 2, (), 1))
    sample = P.sample(5, generator=torch.Generator().manual_seed(3))
    assert sample.shape == (*batch, 6, 5)
    z = P.solve(sample)
    again = normal(*batch, 6, 5, seed=3)
    assert_close(z, again, "standard normal numbers", 1e-10)


@given(P=records, batch=st.sampled_from(((), (2,))))
def test_neighbours(P, batch):
    X = normal(P.n, 2)
    if not P.n:
        return
    dense, operator = P.to_dense(), to_linear_operator(P)
    assert_close(operator.to_dense(), dense, "to_linear_operator")
    assert_close(operator @ X, dense @ X, "to_linear_operator")
    assert_close(operator.solve(X), torch.linalg.inv(dense) @ X, "solve", 1e-10)
    assert_close(operator.logdet(), torch.linalg.slogdet(dense).logabsdet, "logdet", 1e-10)
    wide = operator.expand(4, *operator.shape)
    assert_close(wide.to_dense(), dense.expand(4, *dense.shape), "expand")
    root = to_root_linear_operator(P)
    assert_close(root.to_dense(), dense @ dense.mT, "to_root_linear_operator")
    if not P.batch_shape:
        there = to_scipy(P)
        assert_close(torch.from_numpy(there @ X.numpy()), dense @ X, "to_scipy")
        assert_close(torch.from_numpy(there.H @ X.numpy()), dense.mT @ X, "to_scipy, adjoint")


@pytest.mark.parametrize("batch", [(), (2,), (1, 3)], ids=str)
def test_two_factors_multiply_matrices(batch):
    C, K = member("lower_triangular", 3, batch, 0), member("dense", 2, (), 1)
    G, P = normal(3, 2), Kronecker(C, K)
    assert_close(P.apply_matrix(G), C.to_dense() @ G @ K.to_dense().mT, "C G K^T")
    columns = (P.to_dense() @ G.flatten()[:, None])[..., 0]
    assert_close(P.apply_matrix(G).flatten(-2), columns, "P vec(G)")


def test_sizes_are_not_written_out():
    """Factors of 40 and 30, and nothing of 1200 x 1200."""
    P = Kronecker(member("dense", 40, (), 0), member("dense", 30, (), 1))
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for t in pytree.tree_leaves(result):
                largest = max(largest, t.numel() if isinstance(t, Tensor) else 0)
            return result

    with Watch():
        P.solve(P @ normal(1200, 1)), P.inverse(), P.logdet(), P.trace(), P.diagonal()
        P.add_scaled_identity(0.1), P.frobenius_norm(), P.max_abs(), 2 * P, P @ P
    assert 0 < largest <= 2 * 40 * 40


def test_errors():
    C, K = Diagonal.zeros(2), Diagonal.zeros(3)
    with pytest.raises(ValueError, match="expected operators of one dtype and device"):
        Kronecker(C, K.to(torch.float64))
    with pytest.raises(ValueError, match="expected at least one operator, got none"):
        Kronecker()
    with pytest.raises(TypeError, match="expected operators, got Tensor"):
        Kronecker(C, torch.eye(2))
    with pytest.raises(ValueError, match=r"batch shapes that broadcast, got \[2\], \[3\]"):
        Kronecker(*(Diagonal(torch.ones(k, 2)) for k in (2, 3)))
    with pytest.raises(ValueError, match=r"Kronecker\.apply: expected shape \[\.\.\., 6, m\]"):
        Kronecker(C, K) @ torch.zeros(5, 1)
    with pytest.raises(ValueError, match=r"factors of sizes \[2, 3\], got \[3, 2\]"):
        Kronecker(C, K) @ Kronecker(K, C)
    with pytest.raises(ValueError, match="expected two factors, got 3"):
        Kronecker(C, C, K).apply_matrix(torch.zeros(2, 6))
    with pytest.raises(ValueError, match="expected 2 tensors, got 1"):
        Kronecker(C, K).with_tensors([torch.ones(2)])
    with pytest.raises(TypeError):
        Kronecker(C, K) * "2"


class Householder(Operator):
    """A transform of a user's: ``I - 2 u u^T / |u|^2``, which is orthogonal."""

    def __init__(self, u):
        self.u = u

    shape = property(lambda self: torch.Size((len(self.u), len(self.u))))
    dtype = property(lambda self: self.u.dtype)
    device = property(lambda self: self.u.device)
    mT = property(lambda self: self)  # as of tensors

    def apply(self, X):
        return X - 2 * self.u[:, None] * (self.u @ X)[..., None, :] / self.u.square().sum()

    apply_transpose = apply

    def to_dense(self):
        return self.apply(torch.eye(len(self.u), dtype=self.dtype))


def bases():
    """Orthogonal matrices of size 6, each with its dense one."""
    Q1, Q2 = (torch.linalg.qr(normal(n, n, seed=n)).Q for n in (2, 3))
    index = torch.tensor([2, 0, 1, 5, 3, 4])
    product = Kronecker(Dense(Q1), Dense(Q2))
    yield "kronecker", product, torch.kron(Q1, Q2)
    yield "permutation", index, torch.eye(6, dtype=torch.float64)[index]
    reflection = Householder(normal(6, seed=5))
    yield "householder", reflection, reflection.to_dense()


@pytest.mark.parametrize(("name", "Q", "dense"), list(bases()), ids=lambda x: str(x)[:11])
@pytest.mark.parametrize("spec", ["diagonal", "lower_triangular", "block_diagonal(2)"])
def test_rotated_by_any_orthogonal_operator(name, Q, dense, spec):
    A = member(spec, 6, (2,), 0)
    R, X = Rotated(A, Q), normal(6, 3)
    expected = dense @ A.to_dense() @ dense.mT
    assert_close(R, expected, "Q A Q^T")
    assert_close(R @ X, expected @ X, "apply")
    assert_close(R.apply_transpose(X), expected.mT @ X, "apply_transpose")
    assert_close(R.solve(X), torch.linalg.inv(expected) @ X, "solve", 1e-10)
    assert_close(R @ R, expected @ expected, "product")
    assert_close(R + R, 2 * expected, "sum")
    S = normal(6, 6)
    found = R.project(S + S.mT)
    inside = A.project(dense.mT @ (S + S.mT) @ dense).to_dense()
    assert_close(found, dense @ inside @ dense.mT, "Pi(S)")
    assert_close(R.rebase(Q), expected, "rebase to the same basis")
    low = R.to(torch.float32)
    assert low.dtype == torch.float32
    assert_close((low @ X.float()).double(), expected @ X, "in float32", 1e-5)


@pytest.mark.parametrize("spec", ["diagonal", "lower_triangular"])
def test_rebase_is_the_nearest(spec):
    """What is left over is orthogonal to every member in the new basis."""
    (_, P, _), (_, index, _), *_ = bases()
    R = Rotated(member(spec, 6, (), 0), P)
    nearest = R.rebase(index)
    rest = R.to_dense() - nearest.to_dense()
    for seed in range(5):
        other = Rotated(member(spec, 6, (), seed), index)
        assert abs((rest * other.to_dense()).sum()) < 1e-12
    assert nearest.layout == other.layout


def test_members_in_equal_bases_are_of_one_structure():
    A = member("diagonal", 6, (), 0)
    Q1, Q2 = (Kronecker(Dense(normal(2, 2, seed=s)), Dense(normal(3, 3))) for s in (1, 2))
    assert Rotated(A, Q1).layout == Rotated(A, Q1.clone()).layout
    assert Rotated(A, Q1).layout != Rotated(A, Q2).layout
    assert Rotated(A, Q1).layout != Rotated(A, Q1.to_dense()).layout
    with pytest.raises(ValueError, match="one structure"):
        Rotated(A, Q1) + Rotated(A, Q2)
    with pytest.raises(ValueError, match=r"expected indices \[6\], got \[5\]"):
        Rotated(A, torch.arange(5))
    assert isinstance(Rotated(A, Q1), StructuredMatrix)


def test_numbers_without_dimensions_expand_to_no_dimensions():
    eye = parse("scaled_identity").identity(3, dtype=torch.float64)
    P = Kronecker(eye, Dense(normal(2, 2)))
    for same in (P.expand(), to_linear_operator(P), to_root_linear_operator(P)):
        expected = P.to_dense() @ P.to_dense().mT if hasattr(same, "root") else P.to_dense()
        assert_close(same.to_dense(), expected, "expand", 1e-12)
    assert torch.equal(eye.expand().to_dense(), eye.to_dense())
    assert P.expand(2).batch_shape == (2,)
