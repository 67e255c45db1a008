"""Only the rates of steps that were taken count, and what AdamW trains follows the schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from singd import KFAC, SINGD
from singd.step import pipeline
from singd.testing.conformance.training import assert_same, weights
from tests.singd.runs import F64, batches, mean_loss, mlp, train

BOUND: dict[str, Any] = {"T": 1, "kl_clip": 1e-3, "graft": None}


def by_hand(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.05


def relative(optimizer: Any) -> Any:
    first = optimizer.param_groups[0]["lr"]
    return lr_scheduler.LambdaLR(optimizer, lambda step: 0.01 * (1 + step) / first)


SETS: dict[str, Callable[[Any], Any]] = {
    "by hand": by_hand,
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.05, 20),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 0.05, 3),
    "LambdaLR": relative,
}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("method", [SINGD, KFAC])
def test_a_rate_that_is_replaced_before_the_first_step_does_not_count(
    method: Any, name: str
) -> None:
    ends = []
    for lr in (0.05, 5.0):
        model = nn.Sequential(*mlp(), nn.LayerNorm(3, dtype=F64))
        optimizer = method(model, lr=lr, **BOUND)
        scheduler = SETS[name](optimizer)
        for batch in batches(6):
            train(model, optimizer, [batch])
            if scheduler is not None:
                scheduler.step()
        ends.append(weights(model))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def without_gradients(model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    optimizer.step()


def with_a_bad_gradient(model: Any, optimizer: Any) -> None:
    optimizer.zero_grad()
    X, y = batches(1)[0]
    mean_loss(model(X), y).backward()
    model[0].weight.grad[0, 0] = torch.nan
    optimizer.step()


@pytest.mark.parametrize("is_deferred", [False, True])
@pytest.mark.parametrize("is_tensor", [False, True])
@pytest.mark.parametrize("step", [without_gradients, with_a_bad_gradient])
def test_the_rate_of_a_step_that_moved_nothing_does_not_count(
    step: Any, is_tensor: bool, is_deferred: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_deferred:  # as on a GPU
        monkeypatch.setattr(pipeline, "reading_waits", lambda parameters: True)
    ends = []
    for rate in (0.05, 500.0):
        model = mlp()
        lr: Any = torch.tensor(0.05) if is_tensor else 0.05
        optimizer = SINGD(model, lr=lr, **BOUND)
        train(model, optimizer, batches(2))
        optimizer.param_groups[0]["lr"] = lr * 0 + rate
        step(model, optimizer)
        optimizer.param_groups[0]["lr"] = lr * 0 + 0.05
        train(model, optimizer, batches(5)[2:])
        ends.append(weights(model))
    assert_same(*ends, "weights")


def test_the_rate_of_a_group_that_was_added_counts_from_its_first_step() -> None:
    ends = []
    for lr in (0.05, 50.0):
        model = mlp()
        optimizer = SINGD(model, model[0].parameters(), lr=0.05, **BOUND)
        train(model, optimizer, batches(2))
        optimizer.add_param_group({"params": list(model[2].parameters()), "lr": lr})
        optimizer.param_groups[1]["lr"] = 0.05
        train(model, optimizer, batches(5)[2:])
        ends.append(weights(model))
    assert_same(*ends, "weights")


def test_groups_remember_their_own_rates() -> None:
    model = mlp()
    groups = [{"params": m.parameters(), "lr": lr} for m, lr in ((model[0], 0.1), (model[2], 0.01))]
    optimizer = SINGD(model, groups, **BOUND)
    train(model, optimizer, batches(2))
    assert [group["peak_lr"] for group in optimizer.param_groups] == [0.1, 0.01]


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.05, 40),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 0.05, 3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    "SWALR": lambda o: SWALR(o, 0.01, 3),
}


@pytest.mark.filterwarnings("ignore:0.weight. .* AdamW trains it instead")
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_layer_that_is_handed_over_moves_at_the_rate_of_adamw_under_the_schedule(
    name: str,
) -> None:
    model = mlp()
    optimizer = SINGD(model, lr=0.05, adamw={"lr": 1e-3}, **BOUND)
    scheduler = SCHEDULES[name](optimizer)
    for step, (X, y) in enumerate(batches(16)):
        optimizer.zero_grad()
        again = model[0].weight.square().sum() if step > 3 else 0.0
        (mean_loss(model(X), y) + again).backward()
        before, rate = model[0].weight.detach().clone(), optimizer.param_groups[0]["lr"]
        optimizer.step()
        if step > 8:
            moved = float((model[0].weight - before).abs().max().detach())
            assert moved <= 2.0 * rate * 1e-3 / 0.05
        scheduler.step()
    assert optimizer.param_groups[0]["handed_over"] == ("0.weight",)
