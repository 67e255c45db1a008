"""The best root in a structure: theory, stationarity, and how much of S each structure holds."""

import importlib

import pytest
import torch
from torch import Tensor

from structured import LowerToeplitz, StructuredMatrix, divergence, inverse_root, parse
from tests.structured.algebras import Wasteful

MODULE = importlib.import_module("structured.inverse_root")  # the attribute is the function
CLOSED_FORMS = [
    "dense",
    "diagonal",
    "block_diagonal(5)",
    "lower_triangular",
    "upper_triangular",
    "lower_toeplitz",
    "upper_toeplitz",
    "hierarchical(3, 2)",
    "low_rank_upper(2)",
    "low_rank_lower(-2)",
    "direct_sum(dense, upper_toeplitz, 5)",
    "tied(2, lower_triangular)",
    "strided(3, dense)",
    "rotated(diagonal, cosine)",
    "rotated(block_lower(lower_toeplitz, tied(2, dense), 4), hadamard)",
    "transposed(lower_toeplitz)",
    "transposed(direct_sum(transposed(lower_triangular), dense, 5))",
]
ITERATED = ["scaled_identity", "circulant", "block_circulant(3)"]
SPECS = CLOSED_FORMS + ITERATED


class Bare(StructuredMatrix):
    """Lower Toeplitz again, as a user would begin: nothing but what must be written."""

    t: Tensor  # [..., n]

    @classmethod
    def zeros(cls, n, *, batch_shape=(), **opts):
        return cls(torch.zeros(*batch_shape, n, **opts))

    def to_dense(self):
        return LowerToeplitz(self.t).to_dense()


def spd(*batch, n=12, seed=0):
    """Symmetric positive definite, condition about 300."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(*batch, n, 2 * n, dtype=torch.float64, generator=generator)
    X = torch.logspace(0, 1, n, dtype=torch.float64)[:, None] * X
    return X @ X.mT / (2 * n)


def eye(n=12):
    return torch.eye(n, dtype=torch.float64)


def residual(K, S):
    """``|Pi(K^T S K) - I|``, with nothing of the code under test."""
    dense = K.to_dense()
    return (K.project(dense.mT @ S @ dense).to_dense() - eye(K.n)).abs().max()


@pytest.mark.parametrize("spec", ["dense", "lower_triangular", "upper_triangular"])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 12])
def test_full_structures_reach_the_inverse(spec, n):
    S = spd(n=n)
    K = inverse_root(spec, S, 0.5).to_dense()
    expected = torch.linalg.inv(S + 0.5 * eye(n))
    torch.testing.assert_close(K @ K.mT, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("structure", [*SPECS, Bare], ids=str)
def test_stationarity(structure):
    K = inverse_root(structure, spd(), 0.1)
    assert residual(K, spd() + 0.1 * eye()) < 1e-9
    assert K.layout == parse(structure)(12).layout


@pytest.mark.parametrize("structure", [*SPECS, Bare], ids=str)
def test_no_member_nearby_is_better(structure):
    S = spd()
    K = inverse_root(structure, S)
    least = divergence(K, S)
    generator = torch.Generator().manual_seed(3)
    for _ in range(10):
        noise = K.map(lambda t: torch.randn(t.shape, generator=generator, dtype=t.dtype))
        assert divergence(K + 1e-3 * noise / noise.frobenius_norm(), S) > least


@pytest.mark.parametrize("wrap", ["{}", "transposed({})"])
def test_iteration_and_closed_form_agree(wrap, monkeypatch):
    monkeypatch.setattr(MODULE, "_MAX_ITERATIONS", 500)  # without momentum 2200
    S = spd(2)
    expected = inverse_root(wrap.format("lower_toeplitz"), S).to_dense()
    actual = inverse_root(wrap.format("bare"), S).to_dense()
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("spec", SPECS)
def test_batches(spec):
    S, damping = spd(2, 3), torch.rand(2, 3, dtype=torch.float64)
    K = inverse_root(spec, S, damping)
    assert K.batch_shape == (2, 3)
    nats = divergence(K, S, damping)
    for i in range(2):
        for j in range(3):
            one = inverse_root(spec, S[i, j], damping[i, j])
            expected = one.to_dense()
            torch.testing.assert_close(K.to_dense()[i, j], expected, rtol=1e-8, atol=1e-8)
            expected = divergence(one, S[i, j], damping[i, j])
            torch.testing.assert_close(nats[i, j], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize(
    "spec", ["diagonal", "circulant", "scaled_identity", "lower_toeplitz", "hierarchical(2, 2)"]
)
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_smallest_sizes(spec, n, batch):
    S = spd(*batch, n=n) + eye(n)
    K = inverse_root(spec, S)
    torch.testing.assert_close(K.to_dense() ** 2, torch.linalg.inv(S), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(divergence(K, S), torch.zeros(batch, dtype=torch.float64))


@pytest.mark.parametrize(
    "chain",
    [
        ["scaled_identity", "diagonal", "block_diagonal(3)", "block_diagonal(6)", "dense"],
        ["scaled_identity", "tied(4, dense)", "tied(2, dense)", "block_diagonal(6)"],
        ["lower_toeplitz", "lower_triangular", "dense"],
        ["diagonal", "low_rank_upper(2)", "hierarchical(2, 3)", "hierarchical(4, 3)", "dense"],
        ["scaled_identity", "circulant", "dense"],
        ["tied(6, dense)", "tied(3, direct_sum(dense, dense, 2))", "tied(3, dense)"],
    ],
    ids=" < ".join,
)
def test_a_larger_structure_holds_more(chain):
    nats = torch.stack([divergence(inverse_root(spec, spd()), spd()) for spec in chain])
    assert (nats[:-1] >= nats[1:] - 1e-9).all()
    assert nats[-1] >= -1e-9
    if chain[-1] == "dense":
        torch.testing.assert_close(nats[-1], torch.zeros_like(nats[-1]), rtol=0, atol=1e-9)


def test_divergence_is_that_of_the_gaussians():
    S = spd()
    K = inverse_root("hierarchical(2, 3)", S, 0.3)
    dense, zero = K.to_dense(), torch.zeros(12, dtype=torch.float64)
    p = torch.distributions.MultivariateNormal(zero, dense @ dense.mT)
    q = torch.distributions.MultivariateNormal(zero, precision_matrix=S + 0.3 * eye())
    expected = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(divergence(K, S, 0.3), expected, rtol=1e-10, atol=1e-10)


def test_the_iteration_needs_no_commuting_members(monkeypatch):
    monkeypatch.setattr(MODULE, "_MAX_ITERATIONS", 500)
    S = spd(n=3)
    K = inverse_root(Wasteful, S).to_dense()  # lower triangular
    torch.testing.assert_close(K @ K.mT, torch.linalg.inv(S), rtol=1e-8, atol=1e-8)


def test_the_iteration_stops_at_its_tolerance(monkeypatch):
    """The residual it stops at is the least tolerance, by sqrt(n), that stops it there."""

    def solved(tolerance):
        monkeypatch.setattr(MODULE, "_TOLERANCE", tolerance)
        K = inverse_root(Bare, spd())
        dense = K.to_dense()
        return K, (K.project(dense.mT @ spd() @ dense).to_dense() - eye()).norm() / 12**0.5

    K, error = solved(1e-3)
    assert error <= 1e-3
    assert torch.equal(solved(1.001 * error)[0].to_dense(), K.to_dense())
    assert solved(0.999 * error)[1] < error


def test_the_iteration_stops_where_rounding_hides_the_rest(monkeypatch):
    monkeypatch.setattr(MODULE, "_MAX_ITERATIONS", 200)
    ramp = torch.arange(12.0, dtype=torch.float64)
    lag = (ramp[:, None] - ramp) % 12
    S = torch.cos(lag * torch.pi / 6) + 1e-7 * eye()  # eigenvalues 6 and 1e-7
    K = inverse_root("circulant", S).to_dense()
    torch.testing.assert_close(K @ K.mT @ S, eye(), rtol=0, atol=1e-5)


def test_low_precision_is_computed_in_double():
    S = spd()
    K = inverse_root("lower_triangular", S.bfloat16())
    assert K.dtype == torch.bfloat16
    exact = inverse_root("lower_triangular", S.bfloat16().double()).to(torch.bfloat16)
    assert torch.equal(K.to_dense(), exact.to_dense())
    assert divergence(K, S.bfloat16()).dtype == torch.bfloat16


def test_gradients():
    S = spd(n=6)

    def nats(S):
        S = (S + S.mT) / 2
        return torch.stack(
            [divergence(inverse_root(s, S), S) for s in ("diagonal", "tied(2, dense)")]
        )

    assert torch.autograd.gradcheck(nats, S.requires_grad_(), fast_mode=True)


def test_errors():
    with pytest.raises(ValueError, match=r"expected S \[..., n, n\], got \[3, 2\]"):
        inverse_root("dense", torch.zeros(3, 2))
    with pytest.raises(torch.linalg.LinAlgError):
        inverse_root("dense", -spd())
    with pytest.raises(ValueError, match="divisible"):
        inverse_root("tied(5, dense)", spd())
    with pytest.raises(ValueError, match="expected shape"):
        divergence(parse("dense").identity(3, dtype=torch.float64), spd())


def test_no_end_is_an_error(monkeypatch):
    monkeypatch.setattr(MODULE, "_MAX_ITERATIONS", 3)
    with pytest.raises(RuntimeError, match="after 3 steps for Circulant"):
        inverse_root("circulant", spd())
