"""Members as operators of linear_operator and of SciPy: what their own tests leave out."""

import copy

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from linear_operator.operators import KroneckerProductLinearOperator

from structured import Sum, parse
from structured.interop import to_linear_operator, to_root_linear_operator, to_scipy
from tests.structured.specs import SPECS

TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}
by_spec = pytest.mark.parametrize("spec", SPECS)


def draw(spec, batch_shape=(), dtype=torch.float64):
    zero = parse(spec)(6, batch_shape=batch_shape, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    noise = zero.map(lambda t: torch.randn(t.shape, generator=generator).to(t))
    return (0.3 * noise).add_scaled_identity(1.5)


def columns(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def same(actual, expected):
    torch.testing.assert_close(actual, expected, **TOLERANCE)


@by_spec
@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_inverses_without_symmetry(spec, batch):
    A = draw(spec, batch)
    operator, dense, X = to_linear_operator(A), A.to_dense(), columns(*batch, 6, 2)
    same(operator.solve(X), torch.linalg.solve(dense, X))
    same(torch.linalg.solve(operator, X), torch.linalg.solve(dense, X))
    same(operator.mT.solve(X), torch.linalg.solve(dense.mT, X))
    same(operator.solve(X, X.mT), X.mT @ torch.linalg.solve(dense, X))
    same(operator.solve(X[..., 0, :, 0] if batch else X[:, 0]), _solve_vector(dense, X, batch))
    same(operator.logdet(), torch.linalg.slogdet(dense).logabsdet)
    terms = (X * torch.linalg.solve(dense, X)).sum(-2)
    same(operator.inv_quad(X), terms.sum(-1))
    quad, logdet = operator.inv_quad_logdet(X, logdet=True, reduce_inv_quad=False)
    same(quad, terms)
    same(logdet, operator.logdet())
    same(operator.diagonal(), dense.diagonal(dim1=-2, dim2=-1))
    U, S, Vh = torch.linalg.svd(operator)
    same(U.to_dense() @ torch.diag_embed(S) @ Vh.to_dense(), dense)


def _solve_vector(dense, X, batch):
    vector = X[..., 0, :, 0] if batch else X[:, 0]
    return torch.linalg.solve(dense, vector[:, None])[..., 0]


@by_spec
def test_root(spec):
    K = draw(spec)
    operator, dense, X = to_root_linear_operator(K), K.to_dense() @ K.to_dense().mT, columns(6, 2)
    same(operator.to_dense(), dense)
    same(operator @ X, dense @ X)
    same(operator.solve(X), torch.linalg.solve(dense, X))
    same(operator.logdet(), torch.logdet(dense))
    root = operator.root_inv_decomposition().root.to_dense()
    same(root @ root.mT, torch.linalg.inv(dense))
    same((3.0 * operator).solve(X), torch.linalg.solve(3 * dense, X))


@by_spec
def test_gradients_arrive_in_the_member(spec):
    K, X = draw(spec), columns(6, 2)

    def quadratic(*tensors):
        operator = to_root_linear_operator(K.with_tensors(tensors))
        return operator.inv_quad(X), operator.logdet(), operator @ X

    tensors = [t.clone().requires_grad_() for t in K.tensors()]
    assert torch.autograd.gradcheck(quadratic, tensors, fast_mode=True)


def test_defaults_of_the_quadratic_form():
    operator, X = to_linear_operator(draw("lower_triangular")), columns(6, 2)
    quad, logdet = operator.inv_quad_logdet(X)
    same(quad, operator.inv_quad(X))
    same(logdet, torch.zeros((), dtype=torch.float64))


def test_constants_broadcast_over_the_batch():
    A, c = draw("dense", (2, 3)), torch.tensor([1.0, 2.0, 3.0]).double()[:, None, None]
    same((to_linear_operator(A) * c).to_dense(), c * A.to_dense())


def test_products_with_vectors():
    A, x = draw("lower_triangular"), columns(6)
    operator = to_linear_operator(A)
    same(operator @ x, A @ x)
    same(operator._t_matmul(x), x @ A)


def test_composites_of_linear_operator_ask_for_our_solves():
    """A Kronecker product solves by its factors; conjugate gradients are what it says they are."""
    operator = to_root_linear_operator(draw("dense"))
    dense = torch.kron(operator.to_dense(), operator.to_dense())
    product, X = KroneckerProductLinearOperator(operator, operator), columns(36, 2)
    same(product._solve(X), torch.linalg.solve(dense, X))
    X = columns(6, 2)
    same(operator._solve(X), operator.solve(X))
    solution, tridiagonal = operator._solve(X, None, num_tridiag=2)
    torch.testing.assert_close(solution, operator.solve(X), rtol=1e-2, atol=1e-2)
    assert tridiagonal.shape[0] == 2


def test_what_needs_symmetry_is_refused():
    operator = to_linear_operator(draw("lower_triangular"))
    for ask in (
        operator.cholesky,
        operator.root_decomposition,
        operator.root_inv_decomposition,
        operator.diagonalization,
        operator.eigh,
        lambda: operator.zero_mean_mvn_samples(3),
        lambda: operator.sqrt_inv_matmul(columns(6, 1)),
    ):
        with pytest.raises(NotImplementedError, match="not known to be symmetric"):
            ask()


def test_conversions_keep_the_structure():
    operator = to_linear_operator(draw("tied(2, lower_triangular)", (2,)))
    assert operator.float().member.dtype == torch.float32
    assert (2 * operator).member.layout == operator.member.layout
    assert operator.expand(4, 2, 6, 6).member.batch_shape == (4, 2)
    assert operator[1].member.batch_shape == ()
    same(copy.deepcopy(operator).to_dense(), operator.to_dense())


@by_spec
def test_scipy_products(spec):
    A = draw(spec)
    operator, dense = to_scipy(A), A.to_dense().numpy()
    X = columns(6, 2).numpy()
    Z = X + 1j * columns(6, 2, seed=2).numpy()
    assert operator.shape == (6, 6)
    assert operator.dtype == np.float64
    for factor in (X, X[:, 0], X[:, :1], Z):
        np.testing.assert_allclose(operator @ factor, dense @ factor, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(operator.H @ factor, dense.T @ factor, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(operator.T @ factor, dense.T @ factor, rtol=1e-12, atol=1e-12)


@by_spec
def test_scipy_solvers(spec):
    A, b = draw(spec), columns(6).numpy()
    x, info = scipy.sparse.linalg.gmres(to_scipy(A), b, rtol=1e-12)
    assert info == 0
    np.testing.assert_allclose(A.to_dense().numpy() @ x, b, rtol=1e-10, atol=1e-10)
    x = scipy.sparse.linalg.lsqr(to_scipy(A), b, atol=1e-14, btol=1e-14)[0]
    np.testing.assert_allclose(A.to_dense().numpy() @ x, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_scipy_raises_low_precision(dtype):
    A = draw("lower_triangular", dtype=dtype)
    operator = to_scipy(A)
    assert operator.dtype == np.float32
    x = columns(6).numpy()
    exact = A.to(torch.float64).to_dense().numpy() @ x
    np.testing.assert_allclose(operator @ x, exact, rtol=1e-6, atol=1e-6)


def test_scipy_has_no_batches():
    with pytest.raises(ValueError, match=r"expected no batch dimensions, got \[3\]"):
        to_scipy(draw("dense", (3,)))


def test_scipy_detaches():
    A = draw("dense").map(lambda t: t.requires_grad_())
    assert isinstance(to_scipy(A) @ np.ones(6), np.ndarray)


@pytest.mark.parametrize("n", [0, 1])
def test_scipy_takes_the_smallest_sizes(n):
    operator = to_scipy(parse("dense").identity(n, dtype=torch.float64))
    for shape in ((n,), (n, 1), (n, 3), (n, 0)):
        X = np.ones(shape)
        if 0 not in shape[1:]:
            np.testing.assert_array_equal(operator @ X, X)
            np.testing.assert_array_equal(operator.H @ X, X)


@pytest.mark.parametrize("wrong", [torch.eye(3), np.eye(3), None])
def test_what_is_no_operator_is_refused(wrong):
    for convert in (to_linear_operator, to_root_linear_operator, to_scipy):
        with pytest.raises(TypeError, match=f"expected a.* got {type(wrong).__name__}"):
            convert(wrong)


def test_what_linear_operator_cannot_index_is_refused():
    S = Sum(draw("diagonal", (2,)), draw("dense"))
    with pytest.raises(TypeError, match="a structured matrix or a Kronecker product, got Sum"):
        to_linear_operator(S)
