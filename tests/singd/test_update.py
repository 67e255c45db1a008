"""The pure functions against the paper's formulas, and Theorem 1 measured."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from singd import update
from singd.capture.statistics import Statistic, are_few
from singd.methods.base import Averages, Stack
from singd.methods.inverse_free import InverseFree, InverseFreeFactors
from structured import Dense, StructuredMatrix, parse
from tests.singd import dense
from tests.singd.dense import STRUCTURES, relative
from tests.singd.paper import SINGD

law = settings(max_examples=15, deadline=None)
sizes = st.integers(1, 7)
seeds = st.integers(0, 10**6)
each_structure = pytest.mark.parametrize("structure", STRUCTURES)


def random_member(structure: str, n: int, batch_shape: tuple[int, ...] = ()) -> StructuredMatrix:
    """Near the identity, with independent entries: not symmetric."""
    zero = parse(structure)(n, dtype=torch.float64, batch_shape=batch_shape)
    return zero.map(lambda t: 0.3 * torch.randn_like(t)).add_scaled_identity(1.0)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@each_structure
@law
@given(n=sizes, rows=st.integers(1, 9), seed=seeds)
def test_curvature_of_the_statistic_is_the_projected_curvature(
    structure: str, n: int, rows: int, seed: int
) -> None:
    torch.manual_seed(seed)
    K, A = random_member(structure, n), torch.randn(n, rows, dtype=torch.float64)
    H = update.curvature(K, update.statistic(K, A))
    k = K.to_dense()
    close(H.to_dense(), dense.projection(structure, n)(k.T @ A @ A.T @ k))


@each_structure
def test_statistics_add_up_over_rows(structure: str) -> None:
    K, A = random_member(structure, 6), torch.randn(6, 7, dtype=torch.float64)
    parts = update.statistic(K, A[:, :2]) + update.statistic(K, A[:, 2:])
    close(parts.to_dense(), update.statistic(K, A).to_dense())


@each_structure
@law
@given(n=sizes, damping=st.floats(0, 2), seed=seeds)
def test_ikfac_is_the_formula(structure: str, n: int, damping: float, seed: int) -> None:
    torch.manual_seed(seed)
    K, A = random_member(structure, n), torch.randn(n, 5, dtype=torch.float64)
    H = update.curvature(K, update.statistic(K, A))
    expected = dense.ikfac(K.to_dense(), A @ A.T, damping, dense.projection(structure, n))
    close(update.ikfac(K, H, damping).to_dense(), expected)


@pytest.mark.parametrize(("of_K", "of_C"), list(zip(STRUCTURES, reversed(STRUCTURES), strict=True)))
@law
@given(d_in=sizes, d_out=sizes, damping=st.floats(0, 2), seed=seeds)
def test_singd_is_the_formula(
    of_K: str, of_C: str, d_in: int, d_out: int, damping: float, seed: int
) -> None:
    torch.manual_seed(seed)
    K, C = random_member(of_K, d_in), random_member(of_C, d_out)
    A = torch.randn(d_in, 5, dtype=torch.float64)
    B = torch.randn(d_out, 5, dtype=torch.float64)
    H_K = update.curvature(K, update.statistic(K, A))
    H_C = update.curvature(C, update.statistic(C, B))
    got = update.singd(K, C, H_K, H_C, damping)
    pi_K, pi_C = dense.projection(of_K, d_in), dense.projection(of_C, d_out)
    expected = dense.singd(K.to_dense(), C.to_dense(), A @ A.T, B @ B.T, damping, pi_K, pi_C)
    for m, wanted in zip(got, expected, strict=True):
        close(m.to_dense(), wanted)


@each_structure
def test_the_step_multiplies_from_the_right(structure: str) -> None:
    K, m = random_member(structure, 6), random_member(structure, 6)
    k, I = K.to_dense(), torch.eye(6, dtype=torch.float64)
    close(update.factor_step(K, m, 0.3).to_dense(), k @ (I - 0.3 * m.to_dense()))


@each_structure
def test_preconditioning_applies_both_factors(structure: str) -> None:
    K, C = random_member(structure, 6), random_member(structure, 5)
    G = torch.randn(5, 6, dtype=torch.float64)
    k, c = K.to_dense(), C.to_dense()
    close(update.precondition(K, C, G), c @ c.T @ G @ k @ k.T)
    method, factors = InverseFree(), InverseFreeFactors(K, C)
    for keep in (False, True):
        options = {"keep_products": keep, "preconditioner_dtype": (None, None)}
        products = method.products(factors, options)
        close(method.precondition(factors, G, products), c @ c.T @ G @ k @ k.T)


@each_structure
def test_batches_are_layers_side_by_side(structure: str) -> None:
    K, C = random_member(structure, 5, (3,)), random_member(structure, 4, (3,))
    A, B = torch.randn(3, 5, 6, dtype=torch.float64), torch.randn(3, 4, 6, dtype=torch.float64)

    def step(K: StructuredMatrix, C: StructuredMatrix, A: Tensor, B: Tensor) -> list[Tensor]:
        H_K = update.curvature(K, update.statistic(K, A))
        H_C = update.curvature(C, update.statistic(C, B))
        m_K, m_C = update.singd(K, C, H_K, H_C, 0.1)
        K = update.factor_step(K, m_K, update.normalize_lr_cov(0.2, m_K))
        C = update.factor_step(C, update.ikfac(C, H_C, 0.1), 0.2)
        return [K.to_dense(), C.to_dense(), m_C.to_dense(), update.precondition(K, C, B @ A.mT)]

    together = step(K, C, A, B)
    for i in range(3):
        alone = step(K.map(lambda t: t[i]), C.map(lambda t: t[i]), A[i], B[i])  # noqa: B023
        for got, expected in zip(together, alone, strict=True):
            close(got[i], expected)


@law
@given(n=sizes, scale=st.floats(0.01, 100), seed=seeds)
def test_a_normalized_step_moves_no_entry_by_more_than_lr_cov(
    n: int, scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    m = scale * random_member("dense", n)
    largest = (update.normalize_lr_cov(0.1, m) * m).max_abs()
    assert float(largest) == pytest.approx(0.1 * min(1.0, float(m.max_abs())))


def test_kfac_averages_and_inverts() -> None:
    S, new = (A @ A.T for A in torch.randn(2, 5, 8, dtype=torch.float64))
    close(update.kfac_average(Dense(S), Dense(new), 0.3).to_dense(), 0.7 * S + 0.3 * new)
    close(update.kfac_inverse(S, 0.5), dense.kfac(S, 0.5))


def test_the_damped_inverse_of_what_is_not_positive_definite_is_nan() -> None:
    S = torch.stack([torch.zeros(3, 3), torch.eye(3)])
    inverse = update.kfac_inverse(S, 0.0)
    assert inverse[0].isnan().any()
    torch.testing.assert_close(inverse[1], torch.eye(3))  # damped by what rounding resolves


@law
@given(kl_clip=st.floats(1e-8, 1e2), quadratic=st.floats(1e-8, 1e8))
def test_the_trust_region_bounds_the_step_and_leaves_small_ones(
    kl_clip: float, quadratic: float
) -> None:
    nu = float(update.kl_scale(kl_clip, torch.tensor(quadratic, dtype=torch.float64)))
    assert nu**2 * quadratic == pytest.approx(min(kl_clip, quadratic))
    assert 0.0 < nu <= 1.0


# Theorem 1 ---------------------------------------------------------------------------------------


def measured_order(n: int, damping: float, seed: int, wrong: float = 1.0) -> float:
    """Order in ``beta_1`` of the difference of ``(S + lambda I)^-1`` after one step of each."""
    generator = torch.Generator().manual_seed(seed)
    S, new = (
        A @ A.T / (n + 3)
        for A in torch.randn(2, n, n + 3, generator=generator, dtype=torch.float64)
    )
    K = parse("dense")(n, dtype=torch.float64).orthogonal_project(
        torch.linalg.cholesky(dense.kfac(S, damping))
    )
    A = torch.linalg.cholesky(new)
    m = wrong * update.ikfac(K, update.curvature(K, update.statistic(K, A)), damping)
    steps = torch.logspace(-2, -4, 5, dtype=torch.float64) / float(m.frobenius_norm() + 1)
    errors = []
    for b1 in steps.tolist():
        k = update.factor_step(K, m, b1).to_dense()
        average = update.kfac_average(Dense(S), Dense(new), b1).to_dense()
        expected = update.kfac_inverse(average, damping)
        errors.append(relative(k @ k.T, expected))
    x, y = steps.log(), torch.tensor(errors, dtype=torch.float64).log()
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x @ x))


@pytest.mark.parametrize("n", [1, 2, 5, 20, 60])
@pytest.mark.parametrize("damping", [1e-2, 1.0])
def test_theorem_1(n: int, damping: float) -> None:
    """IKFAC is KFAC to first order in ``beta_1`` (arXiv 2312.05705, Theorem 1)."""
    for seed in range(3):
        assert measured_order(n, damping, seed) >= 1.9


def test_the_measure_of_theorem_1_sees_a_wrong_step() -> None:
    assert measured_order(5, 0.1, 0, wrong=1.01) < 1.5


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kfac_like", [False, True])
@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("factor_clip", [None, 0.5])
@pytest.mark.parametrize("rows", [1, 7])
def test_the_fused_step_is_its_reference(
    structure: str, factor_clip: float | None, products: bool, kfac_like: bool, rows: int
) -> None:
    """Layers of several sizes at once, in all forms, as :meth:`InverseFree.update` one by one."""
    torch.manual_seed(0)
    method = InverseFree()
    options = {**SINGD(torch.nn.Linear(2, 2)).defaults, "kfac_like": kfac_like}
    options |= {"factor_clip": factor_clip, "keep_products": products, "lr_cov": 0.4}
    stacks, expected = [], []
    for n, scale in ((5, 1.0), (3, 30.0), (6, 0.1)):
        sides, averages, held = [], [], []
        for size in (n, n + 1):
            K = random_member(structure, size, (2,))
            X = scale * torch.randn(2, size, rows, dtype=torch.float64)
            kind = "covariance" if K.closed_under_congruence else "whitened"
            sides.append(K)
            averages.append(Statistic(update.statistic(K, X), kind))  # type: ignore[arg-type]
            is_few = structure == "dense" and are_few(X)
            held.append(Statistic(X) if is_few else averages[-1])
        factors = InverseFreeFactors(*sides)
        expected.append(method.update(factors, Averages(*averages), options, 0))
        stacks.append(Stack(factors, Averages(*held), method.products(factors, options)))
    for got, wanted in zip(method.update_all(stacks, options, 0), expected, strict=True):
        for name, member in got.members().items():
            close(member.to_dense(), wanted.members()[name].to_dense())
