"""The best root in a structure: theory, stationarity, and how much of S each structure holds."""

import pytest
import torch
from torch import Tensor

from structured import (
    Dense,
    Kronecker,
    LowerToeplitz,
    Rotated,
    StructuredMatrix,
    Sum,
    divergence,
    inverse_root,
    parse,
)
from structured._roots import iteration
from structured._roots.power import inverse_power
from tests.structured.algebras import Complex, Wasteful

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
SPECS = [*CLOSED_FORMS, "scaled_identity", "circulant", "block_circulant(3)", Complex]


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
    monkeypatch.setattr(iteration, "_MAX_ITERATIONS", 500)  # without momentum 2200
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
    monkeypatch.setattr(iteration, "_MAX_ITERATIONS", 500)
    S = spd(n=3)
    K = inverse_root(Wasteful, S).to_dense()  # lower triangular
    torch.testing.assert_close(K @ K.mT, torch.linalg.inv(S), rtol=1e-8, atol=1e-8)


def test_the_iteration_stops_at_its_tolerance(monkeypatch):
    """The residual it stops at is the least tolerance, by sqrt(n), that stops it there."""

    def solved(tolerance):
        monkeypatch.setattr(iteration, "_TOLERANCE", tolerance)
        K = inverse_root(Bare, spd())
        dense = K.to_dense()
        return K, (K.project(dense.mT @ spd() @ dense).to_dense() - eye()).norm() / 12**0.5

    K, error = solved(1e-3)
    assert error <= 1e-3
    assert torch.equal(solved(1.001 * error)[0].to_dense(), K.to_dense())
    assert solved(0.999 * error)[1] < error


def test_the_iteration_stops_where_rounding_hides_the_rest(monkeypatch):
    """Without an allowance for rounding it would go on for ever."""
    monkeypatch.setattr(iteration, "_TOLERANCE", 0.0)
    S = spd()
    K = inverse_root(Bare, S)
    assert residual(K, S) < 1e-12


def test_circulant_roots_are_exact_for_any_condition():
    ramp = torch.arange(12.0, dtype=torch.float64)
    lag = (ramp[:, None] - ramp) % 12
    S = torch.cos(lag * torch.pi / 6) + 1e-7 * eye()  # eigenvalues 6 and 1e-7
    K = inverse_root("circulant", S).to_dense()
    torch.testing.assert_close(K @ K.mT @ S, eye(), rtol=0, atol=1e-5)


WHITENED = ["dense", "lower_triangular", "upper_triangular", "transposed(lower_triangular)"]


@pytest.mark.parametrize("spec", WHITENED)
@pytest.mark.parametrize("n", [0, 1, 2, 7, 12])
def test_full_structures_whiten(spec, n):
    S = spd(2, n=n)
    K = inverse_root(spec, S, 0.5, kind="whitening").to_dense()
    P, damped = K @ K.mT, S + 0.5 * eye(n)
    torch.testing.assert_close(P @ damped @ P, eye(n).expand(2, n, n), rtol=1e-9, atol=1e-9)


def whiteness(K, S):
    """The criterion: ``trace(K^T S K) + trace((K K^T)^{-1})``."""
    dense = K.to_dense()
    return (dense * (S @ dense)).sum((-2, -1)) + torch.linalg.inv(dense).square().sum((-2, -1))


@pytest.mark.parametrize("structure", [*SPECS, Bare], ids=str)
def test_no_member_nearby_whitens_better(structure):
    S = spd(2)
    K = inverse_root(structure, S, kind="whitening")
    assert K.layout == parse(structure)(12, batch_shape=(2,)).layout
    least = whiteness(K, S)
    generator = torch.Generator().manual_seed(3)
    for _ in range(10):
        noise = K.map(lambda t: torch.randn(t.shape, generator=generator, dtype=t.dtype))
        assert (whiteness(K + 1e-3 * noise / noise.frobenius_norm(), S) > least).all()
    slope = K.to_dense().mT @ S @ K.to_dense()
    inverse = torch.linalg.inv(K.to_dense())
    difference = K.project(slope) - K.project(inverse @ inverse.mT)
    assert (difference.frobenius_norm() < 1e-7).all()


OF_MEMBERS = ["dense", "diagonal", "block_diagonal(5)", "circulant", "block_circulant(3)"]
OF_MEMBERS += ["scaled_identity", "tied(2, circulant)", "strided(3, diagonal)"]
OF_MEMBERS += ["direct_sum(circulant, dense, 5)", "rotated(circulant, cosine)"]


@pytest.mark.parametrize("spec", OF_MEMBERS)
@pytest.mark.parametrize("kind", ["inverse", "whitening"])
def test_members_have_roots_of_their_structure(spec, kind):
    """Exact ones, that are those of the dense matrix, and it is not written out."""
    S = parse(spec)(12, dtype=torch.float64).project(spd(2))
    K = inverse_root(spec, S, 0.1, kind=kind)
    assert K.layout == S.layout
    P, dense = K.to_dense() @ K.to_dense().mT, S.to_dense() + 0.1 * eye()
    whole = P @ dense if kind == "inverse" else P @ dense @ P
    torch.testing.assert_close(whole, eye().expand(2, 12, 12), rtol=1e-9, atol=1e-9)
    expected = inverse_root(spec, S.to_dense(), 0.1, kind=kind).to_dense()
    torch.testing.assert_close(K.to_dense(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spec", ["circulant", "rotated(diagonal, hadamard)", "scaled_identity"])
def test_members_are_not_written_out(spec, monkeypatch):
    S = parse(spec).identity(12, dtype=torch.float64)
    monkeypatch.setattr(StructuredMatrix, "to_dense", None)
    for cls in (type(S), type(getattr(S, "A", S))):
        monkeypatch.setattr(cls, "to_dense", None)
    for structure in (spec, "scaled_identity"):
        assert inverse_root(structure, S, 3.0).trace() == 6.0


@pytest.mark.parametrize("structure", ["diagonal", "lower_triangular", "circulant", "dense"])
def test_roots_of_any_operator(structure):
    C, K = spd(3, n=3), spd(n=4)
    S = Kronecker(Dense(C), Dense(K))
    for kind in ("inverse", "whitening"):
        found = inverse_root(structure, S, 0.1, kind=kind)
        expected = inverse_root(structure, S.to_dense(), 0.1, kind=kind)
        torch.testing.assert_close(found.to_dense(), expected.to_dense(), rtol=1e-9, atol=1e-9)
    rotated = Rotated(parse("diagonal").identity(12, dtype=torch.float64), "cosine")
    found = inverse_root(structure, 4 * rotated).to_dense()
    torch.testing.assert_close(found @ found.mT, eye() / 4)


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
            [divergence(inverse_root(s, S), S) for s in ("diagonal", "circulant", Complex)]
        )

    assert torch.autograd.gradcheck(nats, S.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("p", [0.5, 0.25])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradients_of_powers(p, dtype):
    """Where eigenvalues are equal too."""
    S = spd(2, n=4).to(dtype)
    S[0] = 3 * torch.eye(4)

    def power(M):
        return inverse_power((M + M.mH) / 2, p)

    assert torch.autograd.gradcheck(power, S.clone().requires_grad_())
    values = torch.linalg.eigvalsh(S)
    found = torch.linalg.eigvalsh(power(S)).flip(-1)
    torch.testing.assert_close(found, values**-p)


def test_errors():
    with pytest.raises(ValueError, match=r"expected a kind of \['inverse', 'whitening'\], got 'w'"):
        inverse_root("dense", spd(), kind="w")
    with pytest.raises(ValueError, match=r"expected S \[..., n, n\], got \[3, 2\]"):
        inverse_root("dense", torch.zeros(3, 2))
    with pytest.raises(torch.linalg.LinAlgError):
        inverse_root("dense", -spd())
    with pytest.raises(ValueError, match="divisible"):
        inverse_root("tied(5, dense)", spd())
    with pytest.raises(ValueError, match="expected shape"):
        divergence(parse("dense").identity(3, dtype=torch.float64), spd())


def test_no_end_is_an_error(monkeypatch):
    monkeypatch.setattr(iteration, "_MAX_ITERATIONS", 3)
    with pytest.raises(RuntimeError, match="after 3 steps for Bare"):
        inverse_root("bare", spd())


@pytest.mark.parametrize("kind", ["inverse", "whitening"])
@pytest.mark.parametrize(
    "spec",
    [
        *("dense", "diagonal", "scaled_identity", "circulant", "block_diagonal(2)", "quaternions"),
        *("block_circulant(2)", "lower_triangular", "group_algebra(2)", "kron(dense, dense, 2)"),
        *("tied(2, dense)", "strided(2, circulant)", "rotated(diagonal, hadamard)"),
        *("incidence(divisors)", "transposed(hierarchical(2,2))", "kron(dense, lower_toeplitz, 2)"),
        *("hierarchical(2,2)", "low_rank_upper(2)", "block_upper(dense,diagonal,2)", "bare"),
    ],
)
def test_what_is_not_positive_definite_has_no_root(spec, kind):
    """One of a batch is enough, and an operator as well as a tensor."""
    eye = torch.eye(8, dtype=torch.float64)
    for S in (
        *(-eye, 0 * eye, -eye.float(), torch.stack([eye, -eye])),
        parse("dense").from_dense(-eye),
    ):
        with pytest.raises(torch.linalg.LinAlgError, match="not positive-definite"):
            inverse_root(spec, S, kind=kind)
    torch.testing.assert_close(inverse_root(spec, 0 * eye, 1.0, kind=kind).to_dense(), eye)


@pytest.mark.parametrize("spec", [*SPECS, "incidence(divisors)", "kron(dense, lower_toeplitz, 3)"])
def test_roots_are_roots_or_errors(spec):
    """Where the matrix has lost its rank in rounding, a structure sees enough of it or does not."""
    X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    S = X @ X.mT
    try:
        K = inverse_root(spec, S).double()
    except torch.linalg.LinAlgError:
        return
    M = K.to_dense().mT @ S.double() @ K.to_dense()
    torch.testing.assert_close(M.trace(), M.new_tensor(12.0), rtol=0.2, atol=0)


def test_roots_that_overflow_are_errors():
    with pytest.raises(torch.linalg.LinAlgError, match="not positive-definite"):
        inverse_root("diagonal", torch.zeros(3, 3, dtype=torch.float16), 1e-12)


def test_divergence_of_operators():
    K, S = inverse_root("lower_toeplitz", spd(2)), Dense(spd(2))
    for operator in (S, Sum(S, Dense(0.0 * eye()))):
        torch.testing.assert_close(divergence(K, operator, 0.1), divergence(K, spd(2), 0.1))
