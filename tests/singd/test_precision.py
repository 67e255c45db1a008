"""Low precision: rounding to nearest loses the factors, stochastic rounding keeps them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from singd import update
from singd.ops import reductions
from singd.ops import stochastic_rounding as rounding
from singd.ops.stochastic_rounding import stochastic_round
from structured import Dense, parse
from tests.singd import dense
from tests.singd.dense import STRUCTURES, relative
from tests.singd.paper import SINGD
from tests.singd.runs import batches, distance, factors, mean_loss, mlp, train

LOW = [torch.bfloat16, torch.float16]


# Stochastic rounding -----------------------------------------------------------------------------


def neighbours(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest number of ``dtype`` not above ``x``, and the smallest not below."""
    near = x.to(dtype)
    inf = torch.full_like(near, float("inf"))
    below = torch.where(near.double() > x.double(), torch.nextafter(near, -inf), near)
    above = torch.where(near.double() < x.double(), torch.nextafter(near, inf), near)
    return below, above


@pytest.mark.parametrize("dtype", LOW)
@settings(max_examples=100, deadline=None)
@given(
    x=st.floats(2.0**-10, 2.0**15, width=32),
    sign=st.sampled_from([-1.0, 1.0]),
    seed=st.integers(0, 99),
)
def test_rounds_to_a_neighbour(dtype: torch.dtype, x: float, sign: float, seed: int) -> None:
    values = torch.full((64,), sign * x)
    below, above = neighbours(values, dtype)
    got = stochastic_round(values, dtype, torch.Generator().manual_seed(seed))
    assert got.dtype == dtype
    assert bool(((got == below) | (got == above)).all())


@pytest.mark.parametrize("dtype", LOW)
def test_rounding_is_unbiased(dtype: torch.dtype) -> None:
    """The mean of many roundings is the number, within five standard errors."""
    x, count = torch.arange(-20, 20) * 0.0617 + 0.01, 40_000
    got = stochastic_round(x.expand(count, -1), dtype, torch.Generator().manual_seed(0)).double()
    below, above = neighbours(x, dtype)
    error = (got.mean(0) - x.double()).abs()
    assert bool((error <= 5 * (above.double() - below.double()) / count**0.5).all())
    assert bool((got.std(0)[below < above] > 0).all())


@pytest.mark.parametrize("dtype", LOW)
def test_errors_of_different_pieces_are_not_correlated(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Within five standard errors, for all pairs of six numbers in three pieces."""
    monkeypatch.setattr(rounding, "_PIECE", 2)
    count = 4000
    x = torch.tensor([1.0, 1.001, -1.0, 1.003, 1.0, 0.999]) * (1 + torch.finfo(dtype).eps / 3)
    seeded = [torch.Generator().manual_seed(seed) for seed in range(count)]
    errors = torch.stack([stochastic_round(x, dtype, g).double() for g in seeded]) - x.double()
    correlations = errors.T.corrcoef() - torch.eye(6)
    assert bool((correlations.abs() <= 5 / count**0.5).all())
    assert bool((errors.mean(0).abs() <= 5 * errors.std(0) / count**0.5).all())


@pytest.mark.parametrize("dtype", LOW)
def test_what_is_exact_is_kept(dtype: torch.dtype) -> None:
    special = [0.0, -0.0, 1.0, -3.5, 256.0, float("inf"), -float("inf")]
    x = torch.tensor(special).repeat(100)
    assert torch.equal(stochastic_round(x, dtype), x.to(dtype))
    assert torch.equal(stochastic_round(x, torch.float32), x)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001])
def test_nan_stays_nan(dtype: torch.dtype, bits: int) -> None:
    """Whatever its payload: devices differ in the one they make."""
    x = torch.full((100,), bits, dtype=torch.int32).view(torch.float32)
    assert bool(stochastic_round(x, dtype).isnan().all())


@pytest.mark.parametrize("dtype", [*LOW, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (2, 3, 7)])
def test_sums_of_products_are_wide(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(reductions, "_PIECE", 4)
    X, Y = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(2))
    got, expected = reductions.inner_product(X, Y).sum(), (X.double() * Y.double()).sum()
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


# The factors -------------------------------------------------------------------------------------


def long_run(
    structure: str, store: Any, b1: float = 0.05, steps: int = 300
) -> tuple[Tensor, Tensor]:
    """``K K^T`` after many steps of IKFAC towards a fixed ``S``, and ``(S + lambda I)^-1``."""
    n, damping = 24, 1e-2
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0.3, -0.3, n)[:, None]
    A = scales * torch.randn(n, 4 * n, generator=generator) / (4 * n) ** 0.5
    K = parse(structure).identity(n, dtype=torch.float32)
    for _ in range(steps):
        m = update.ikfac(K, update.curvature(K, update.statistic(K, A)), damping)
        K = update.factor_step(K, m, b1).map(store)
    k = K.to_dense().double()
    return k @ k.T, dense.kfac((A @ A.T).double(), damping)


def stochastic(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return lambda t: stochastic_round(t, torch.bfloat16, generator).float()


def exact(t: Tensor) -> Tensor:
    return t


def nearest(t: Tensor) -> Tensor:
    return t.to(torch.bfloat16).float()


def test_rounding_to_nearest_loses_what_stochastic_rounding_keeps() -> None:
    """The table of the design notes: storage in bfloat16, against the limit."""
    for store, low, high in ((exact, 0, 1e-4), (stochastic(0), 1e-4, 0.01), (nearest, 0.1, 1)):
        assert low <= relative(*long_run("dense", store, 1e-2, 2000)) <= high


@pytest.mark.parametrize("structure", STRUCTURES)
def test_settled_bfloat16_factors_are_within_one_percent_of_float32_ones(structure: str) -> None:
    """The noise of rounding is about half a percent, whatever the seed."""
    high, _ = long_run(structure, exact)
    for seed in range(3):
        low, _ = long_run(structure, stochastic(seed))
        assert 1e-4 < relative(low, high) < 0.01


def test_small_steps_are_lost_altogether_by_rounding_to_nearest() -> None:
    n = 8
    K, m = Dense.identity(n), 0.5 * Dense.identity(n)
    for store, moved in ((nearest, False), (stochastic(0), True)):
        k = K
        for _ in range(200):
            k = update.factor_step(k, m, 1e-3).map(store)
        assert (relative(k.to_dense(), K.to_dense()) > 0.01) == moved


@pytest.mark.parametrize(("structure", "kfac_like"), [("dense", False), ("diagonal", True)])
def test_the_optimizer_in_bfloat16_is_within_one_percent(structure: str, kfac_like: bool) -> None:
    """Weights held still.

    INGD determines ``K`` and ``C`` up to a scale ``(s K, C / s)`` only, and rounding walks along
    it: the preconditioner ``C C^T (x) K K^T`` is compared, not its factors.
    """
    X, y = torch.randn(64, 24) * torch.logspace(0.3, -0.3, 24), torch.randn(64, 16)
    layer, preconditioners = nn.Linear(24, 16, bias=False), []
    for dtype in (torch.float32, torch.bfloat16):
        optimizer = SINGD(
            layer,
            T=1,
            lr=0.0,
            lr_cov=0.05,
            damping=0.1,
            structures=(structure, structure),
            kfac_like=kfac_like,
            preconditioner_dtype=(dtype, dtype),
        )
        for _ in range(300):
            optimizer.zero_grad()
            mean_loss(layer(X), y).backward()
            optimizer.step()
        optimizer.close()
        state = optimizer.state[layer.weight]
        assert state["K"][0].dtype == state["C"][0].dtype == dtype
        zero = parse(structure)(1, dtype=dtype)
        k, c = (zero.with_tensors(state[side]).to_dense().double() for side in "KC")
        preconditioners.append(torch.kron(c @ c.T, k @ k.T))
    assert relative(preconditioners[1], preconditioners[0]) < 0.01
    assert relative(preconditioners[0], torch.eye(24 * 16, dtype=torch.float64)) > 0.1


def test_rounding_is_reproducible_from_the_seed() -> None:
    def run(seed: int) -> Any:
        model = mlp(torch.bfloat16)
        optimizer = SINGD(model, T=1, lr=0.05, seed=seed)
        return train(model, optimizer, batches(4, dtype=torch.bfloat16))

    torch.manual_seed(1)
    first = run(7)
    torch.manual_seed(2)  # the global state does not matter
    assert distance(run(7), first) == 0.0
    assert distance(run(8), first) > 0.0


def test_steps_and_layers_round_independently() -> None:
    """Two equal layers see equal statistics; their factors part by rounding alone."""
    model = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(2)])
    model[1].load_state_dict(model[0].state_dict())
    dtypes = (torch.bfloat16, torch.bfloat16)
    optimizer = SINGD(model, T=1, lr=0.0, preconditioner_dtype=dtypes)
    X = torch.randn(8, 4)
    for _ in range(3):
        optimizer.zero_grad()
        sum(layer(X).square().mean() for layer in model).backward()
        optimizer.step()
    assert not torch.equal(*(factors(optimizer, layer.weight)["K"] for layer in model))


@pytest.mark.filterwarnings("ignore:.*no backward pass was seen")
@pytest.mark.parametrize("dtype", LOW)
def test_weights_in_low_precision_move_by_small_steps(dtype: torch.dtype) -> None:
    """A gradient too small for a unit in the last place still arrives on average."""
    layer = nn.Linear(64, 64, bias=False).to(dtype)
    nn.init.ones_(layer.weight)
    optimizer = SINGD(layer, lr=1e-4, momentum=0.0, lr_cov=0.0, damping=0.0, kl_clip=None)
    for _ in range(100):
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
    assert float(layer.weight.detach().float().mean()) == pytest.approx(0.99, abs=2e-3)


def test_float16_statistics_do_not_overflow() -> None:
    """Sums of squares beyond 65504 are collected in float32."""
    model = nn.Linear(4, 3, bias=False).half()
    optimizer = SINGD(model, T=1, lr_cov=1e-4, preconditioner_dtype=(torch.float32, torch.float32))
    model(torch.full((64, 4), 100.0, dtype=torch.float16)).float().mean().backward()
    optimizer.step()
    assert optimizer.skipped == 0
    assert all(t.isfinite().all() for t in factors(optimizer, model.weight).values())
    assert model.weight.isfinite().all()
