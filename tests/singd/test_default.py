"""What the default promises: AdamW's numbers mean what they did, whatever the scale of the loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW

from singd import SINGD, SOAP, KLShampoo

Make = Callable[[nn.Module], Any]


def digits(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=dtype) / 16, torch.tensor(labels)


def classifier(dtype: torch.dtype = torch.float64, norm: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    between = nn.LayerNorm(24) if norm else nn.Identity()
    layers = nn.Linear(64, 24), between, nn.ReLU(), nn.Linear(24, 10)
    return nn.Sequential(*layers).to(dtype)


def run(
    make: Make,
    steps: int = 25,
    *,
    scale: float = 1.0,
    clip: float | None = None,
    batch: int = 64,
    dtype: torch.dtype = torch.float64,
    autocast: bool = False,
) -> tuple[nn.Module, list[float], Any]:
    model, (X, y) = classifier(dtype, norm=clip is None), digits(dtype)
    optimizer, losses = make(model), []
    for t in range(steps):
        some = torch.arange(t * batch, (t + 1) * batch) % len(X)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = cross_entropy(model(X[some]).float() if autocast else model(X[some]), y[some])
        (scale * loss).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(float(loss.detach()))
    return model, losses, optimizer


def difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float(((p - q).norm() / q.norm()).detach()) for p, q in pairs)


METHODS: dict[str, Make] = {
    "default": SINGD,
    "every step": lambda model: SINGD(model, T=1),
    "dense": lambda model: SINGD(model, structures=("dense", "dense")),
    "hierarchical": lambda model: SINGD(model, structures=("hierarchical(4, 4)", "diagonal")),
    "Toeplitz": lambda model: SINGD(model, structures=("lower_toeplitz", "lower_toeplitz")),
    "IKFAC": lambda model: SINGD(model, kfac_like=True),
    "structures that are chosen": lambda model: SINGD(model, structures="auto"),
    "momentum of factors": lambda model: SINGD(model, alpha1=0.5),
    "KL-Shampoo": KLShampoo,
    "SOAP": SOAP,
}


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize("method", METHODS)
def test_a_loss_times_any_number_is_the_same_run(method: str, scale: float) -> None:
    def make(model: nn.Module) -> Any:
        optimizer = METHODS[method](model)
        optimizer._parts.fallback.options["eps"] = 1e-30  # AdamW's own scale
        return optimizer

    plain, scaled = run(make)[0], run(make, scale=scale)[0]
    assert difference(scaled, plain) < 1e-7


def test_clipped_gradients_are_the_same_run_where_every_direction_has_one_length() -> None:
    def make(model: nn.Module) -> Any:
        return SINGD(model, graft="rms")

    assert difference(run(make, clip=1e-4)[0], run(make, clip=torch.inf)[0]) < 1e-6


@given(factor=st.floats(1e-3, 1e3))
def test_gradients_times_any_number_are_the_same_run(factor: float) -> None:
    """Statistics are of the gradients of the loss, and so they do not change."""

    def make(factor: float, model: nn.Module) -> Any:
        for p in model.parameters():
            p.register_hook(lambda g: factor * g)
        return SINGD(model, adamw={"eps": 1e-30})

    scaled, plain = (run(partial(make, number), steps=6)[0] for number in (factor, 1.0))
    assert difference(scaled, plain) < 1e-6


@given(lr=st.floats(1e-6, 1e-1), factor=st.floats(0.01, 1))
def test_the_first_step_is_in_proportion_to_the_rate(lr: float, factor: float) -> None:
    """A weight and its bias move by a root mean square of 0.2 lr."""

    def moved(rate: float) -> Tensor:
        model = nn.Linear(6, 4).double()
        nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(0))
        nn.init.zeros_(model.bias)
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        optimizer = SINGD(model, lr=rate)
        x = torch.ones(3, 6, dtype=torch.float64).cumsum(1)
        model(x).square().sum(1).mean().backward()
        optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()]) - before

    whole, part = moved(lr), moved(factor * lr)
    torch.testing.assert_close(part, factor * whole, rtol=1e-6, atol=1e-12)
    rms = whole.square().mean().sqrt()
    torch.testing.assert_close(rms, torch.tensor(0.2 * lr, dtype=rms.dtype), rtol=1e-6, atol=1e-12)


def test_weight_decay_is_that_of_adamw() -> None:
    model = nn.Linear(4, 3, bias=False)
    before = model.weight.detach().clone()
    optimizer = SINGD(model, lr=1e-3, weight_decay=0.1)
    for _ in range(400):
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
    torch.testing.assert_close(model.weight, before * (1 - 1e-4) ** 400)


def test_a_rate_a_hundred_times_too_large_shows_and_stays_finite() -> None:
    model, losses, optimizer = run(lambda m: SINGD(m, lr=0.3), 150, dtype=torch.float32)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert optimizer.skipped == 0
    usual = run(SINGD, 150, dtype=torch.float32)[1]
    assert sum(losses[-50:]) > 3 * sum(usual[-50:])


def test_a_rate_a_hundred_times_too_small_trains_slowly() -> None:
    """As slowly as AdamW at that rate, within a factor of two."""
    fallen = [
        1 - sum(losses[-20:]) / sum(losses[:20])
        for make in (partial(SINGD, lr=3e-5), lambda m: AdamW(m.parameters(), lr=3e-5))
        for _, losses, _ in [run(make, 150)]
    ]
    assert 0.5 * fallen[1] < fallen[0] < 2 * fallen[1]


@pytest.mark.parametrize("batch", [8, 64, 512])
@pytest.mark.parametrize("kind", ["float32", "autocast", "bfloat16"])
def test_it_trains_at_every_batch_size_and_precision(batch: int, kind: str) -> None:
    """In sixty steps it is further than AdamW at the same rate."""
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    same: dict[str, Any] = {"batch": batch, "dtype": dtype, "autocast": kind == "autocast"}
    _, losses, optimizer = run(SINGD, 60, **same)
    _, theirs, _ = run(lambda m: AdamW(m.parameters(), lr=3e-3), 60, **same)
    assert sum(losses[-5:]) < 0.9 * sum(theirs[-5:])
    assert sum(losses[-5:]) / 5 < (0.4 if batch > 8 else 0.5) * losses[0]
    assert optimizer.skipped == 0


@given(d_out=st.integers(64, 4096), d_in=st.integers(64, 4096), bias=st.booleans())
def test_the_state_is_at_most_one_and_a_half_times_that_of_adamw(
    d_out: int, d_in: int, bias: bool
) -> None:
    with torch.device("meta"):
        plan = SINGD(nn.Linear(d_in, d_out, bias=bias)).plan()
    assert plan.state_bytes <= 1.5 * (1 + 2 / min(d_in, d_out)) * plan.adamw_bytes


def test_the_state_of_low_rank_adapters_is_small() -> None:
    with torch.device("meta"):
        adapters = nn.Sequential(nn.Linear(4096, 16, bias=False), nn.Linear(16, 4096, bias=False))
    plan = SINGD(adapters).plan()
    assert plan.state_bytes <= 1.51 * plan.adamw_bytes
