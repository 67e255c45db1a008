"""Solves: stable for ill-conditioned members of any size, an error for singular ones."""

import math

import pytest
import torch
from torch.linalg import LinAlgError, matrix_norm, solve_triangular

from structured import parse
from tests.structured.specs import FURTHER, SPECS

# The first numbers of triangular Toeplitz matrices, with growing inverses.
SERIES = {
    "difference": (1.0, -1.0),
    "second difference": (1.0, -2.0, 1.0),
    "third difference": (1.0, -3.0, 3.0, -1.0),
    "oscillation": (1.0, -1.8, 1.0),
    "slow growth": (1.0, -1.001),
    "sums": (1.0,) * 60,
    "small diagonal": (0.1, 0.05, 0.04),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [64, 513, 1031, 2048])
@pytest.mark.parametrize("series", SERIES)
@pytest.mark.parametrize("form", ["lower", "upper"])
def test_toeplitz_solves_are_backward_stable(form, series, n, dtype):
    """The residual is of the order of rounding, as that of substitution on the dense matrix."""
    t = torch.zeros(n, dtype=dtype)
    start = torch.tensor(SERIES[series][:n], dtype=dtype)
    t[: len(start)] = start
    A = parse(f"{form}_toeplitz")(n, dtype=dtype).with_tensors([t])
    X = torch.randn(n, 3, dtype=dtype, generator=torch.Generator().manual_seed(0))
    T = A.to_dense().double()
    b = (T @ X.double()).to(dtype)

    def residual(x):
        x = x.double()
        return matrix_norm(T @ x - b.double()) / (matrix_norm(T) * matrix_norm(x) + matrix_norm(b))

    u = torch.finfo(dtype).eps / 2
    assert residual(A.solve(b)) <= 4 * math.log2(2 * n) * u  # an FFT's bound, norm by norm
    substituted = solve_triangular(A.to_dense(), b, upper=form == "upper")
    ours, theirs = (matrix_norm(x - X) for x in (A.solve(b), substituted))
    assert ours <= 30 * theirs + 100 * u * matrix_norm(X)


def test_toeplitz_solves_of_batches_and_their_gradients():
    generator = torch.Generator().manual_seed(0)
    t = torch.randn(2, 600, dtype=torch.float64, generator=generator) / 600
    A = parse("upper_toeplitz")(600, batch_shape=(2,), dtype=torch.float64).with_tensors([t])
    A = A.add_scaled_identity(1.0)
    X = torch.randn(3, 1, 600, 2, dtype=torch.float64, generator=generator)
    found = A.solve(X)
    assert found.shape == (3, 2, 600, 2)
    torch.testing.assert_close(found, torch.linalg.solve(A.to_dense(), X))

    def solve(t, X):
        return A.with_tensors([t]).solve(X)

    given = (A.t.clone().requires_grad_(), X[0].clone().requires_grad_())
    assert torch.autograd.gradcheck(solve, given, fast_mode=True)


@pytest.mark.parametrize("spec", SPECS)
def test_solves_of_singular_members_raise_under_vmap(spec):
    zero = parse(spec)(6, batch_shape=(2,), dtype=torch.float64)
    X = torch.ones(2, 6, 1, dtype=torch.float64)
    with pytest.raises(LinAlgError, match="singular"):
        torch.vmap(lambda A, X: A.solve(X))(zero, X)


@pytest.mark.parametrize("spec", ["diagonal", "circulant", "lower_toeplitz", "hierarchical(2, 2)"])
def test_solves_of_singular_members_raise_when_compiled(spec):
    torch.compiler.reset()
    zero, X = parse(spec)(6, dtype=torch.float64), torch.ones(6, 1, dtype=torch.float64)
    solve = torch.compile(lambda A, X: A.solve(X), fullgraph=True, backend="aot_eager")
    regular = zero.add_scaled_identity(2.0)
    torch.testing.assert_close(solve(regular, X), X / 2)
    with pytest.raises(LinAlgError, match="singular"):
        solve(zero, X)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [5, 12, 77, 300])
def test_differences_around_a_circle_are_singular(n, dtype):
    """Their rows sum to zero: no system with them has one solution."""
    c = torch.zeros(n, dtype=dtype)
    c[[0, 1, -1]] = torch.tensor([2.0, -1.0, -1.0], dtype=dtype)
    X = torch.ones(n, 1, dtype=dtype)
    with pytest.raises(LinAlgError, match="singular"):
        parse("circulant")(n, dtype=dtype).with_tensors([c]).solve(X)
    blocks = c[:, None, None] * torch.tensor([[1.0, 2.0], [0.0, 1.0]], dtype=dtype)
    A = parse("block_circulant(2)")(2 * n, dtype=dtype).with_tensors([blocks])
    with pytest.raises(LinAlgError, match="singular"):
        A.solve(torch.ones(2 * n, 1, dtype=dtype))


def test_one_zero_in_a_nesting_is_found():
    spec = "block_upper(direct_sum(tied(2, diagonal), dense, 4), rotated(diagonal, cosine), 6)"
    A = parse(spec).identity(9, dtype=torch.float64)
    X = torch.ones(9, 1, dtype=torch.float64)
    assert A.solve(X).isfinite().all()
    for index, t in enumerate(A.tensors()):
        if t.ndim == 1:
            tensors = [other.clone() for other in A.tensors()]
            tensors[index][-1] = 0
            with pytest.raises(LinAlgError, match="singular"):
                A.with_tensors(tensors).solve(X)


@pytest.mark.parametrize("spec", [*SPECS, *FURTHER])
@pytest.mark.parametrize("scale", [1e20, 1e-23])
def test_the_scale_does_not_matter(spec, scale):
    """Not even where squares of the numbers are beyond those of float32."""
    A = parse(spec).randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    A = (A / (2 * A.frobenius_norm())).add_scaled_identity(1.0).float()
    B, x = scale * A, torch.linspace(-1, 1, 12)[:, None]
    for found, expected in (
        (scale * B.solve(x), A.solve(x)),
        (scale * B.mT.solve(x), A.mT.solve(x)),
        (scale * B.inverse().to_dense(), A.inverse().to_dense()),
        (B.logdet(), A.logdet() + 12 * math.log(scale)),
        (B.spectral_norm() / scale, A.spectral_norm()),
        (B.max_abs() / scale, A.max_abs()),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
