"""Rows about parameter groups and learning rate schedules."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer, lr_scheduler

from singd.testing.conformance.training import (
    Make,
    assert_falls,
    assert_near,
    assert_same,
    batches,
    moved,
    net,
    train,
    weights,
)

OWN = {"name": "block", "layer_decay": 0.5, "rho": 0.1, "tags": ("a", "b")}
"""Keys of a user, which no optimizer knows."""

SCHEDULES: dict[str, Any] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, step / 4)),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 4, 0.9),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 24),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 24),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 8),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, 5, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, 24),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.98)], [3]
    ),
}


def halves(model: nn.Sequential) -> list[dict[str, Any]]:
    """The first layer and its normalization, and the last layer."""
    first = [*model[0].parameters(), *model[1].parameters()]
    return [{"params": first}, {"params": list(model[3].parameters())}]


def number_and_order(make: Make) -> None:
    """Groups keep their number, their order and that of their parameters."""
    model = net()
    wanted = halves(model)
    optimizer = make(model, [dict(group) for group in wanted])
    got = [group["params"] for group in optimizer.param_groups]
    sizes = [len(group) for group in got], [len(group["params"]) for group in wanted]
    assert sizes[0] == sizes[1], f"expected groups of {sizes[1]} parameters, got {sizes[0]}"
    for a, b in zip(got, wanted, strict=True):
        same = all(p is q for p, q in zip(a, b["params"], strict=True))
        assert same, "parameters changed their order"


def own_keys(make: Make) -> None:
    """A user's keys stay in a group through steps, saving and loading."""
    model = net()
    first, second = halves(model)
    optimizer = make(model, [{**first, **OWN}, second])
    train(model, optimizer, batches(2))
    _expect_own(optimizer, "after steps")
    other = net()
    fresh = make(other, halves(other))
    fresh.load_state_dict(optimizer.state_dict())
    _expect_own(fresh, "after loading")


def _expect_own(optimizer: Optimizer, when: str) -> None:
    group, other = optimizer.param_groups
    for key, value in OWN.items():
        assert group.get(key) == value, f"{when}: group[{key!r}] is {group.get(key)!r}"
        assert key not in other, f"{when}: {key!r} is in another group too"


def own_rates(make: Make) -> None:
    """A rate of zero freezes a group and nothing else, given or set later, with weight decay."""
    for later in (False, True):
        model = net()
        first, second = halves(model)
        optimizer = make(
            model, [first, second if later else {**second, "lr": 0.0}], weight_decay=0.1
        )
        if later:
            optimizer.param_groups[1]["lr"] = 0.0
        train(model, optimizer, batches(3))
        got = moved(model)
        assert got == [True] * 4 + [False] * 2, f"moved: {got}; expected the first four"


def own_decays(make: Make) -> None:
    """With gradients of zero, a group with weight decay shrinks and one without stays."""
    model = net()
    first, second = halves(model)
    optimizer = make(model, [{**first, "weight_decay": 0.1}, {**second, "weight_decay": 0.0}])
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for place, (after, before) in enumerate(zip(weights(model), weights(net()), strict=True)):
        if place >= 4:
            assert torch.equal(after, before), "a group without weight decay moved"
        elif before.any():
            assert after.norm() < before.norm(), "a group with weight decay did not shrink"


def grouping(make: Make) -> None:
    """How parameters are sorted into groups of the same options does not matter."""
    runs = []
    for kind in ("one", "halves", "weights and others", "each", "reversed"):
        model = net()
        parameters = list(model.parameters())
        groups = {
            "one": [{"params": parameters}],
            "halves": halves(model),
            "weights and others": [
                {"params": [p for p in parameters if p.ndim > 1]},
                {"params": [p for p in parameters if p.ndim < 2]},
            ],
            "each": [{"params": p} for p in parameters],
            "reversed": [{"params": parameters[::-1]}],
        }
        train(model, make(model, groups[kind]), batches(6))
        runs.append((kind, weights(model)))
    for kind, got in runs[1:]:
        assert_near(got, runs[0][1], f"groups by {kind}")


def added_groups(make: Make) -> None:
    """A group that is added is trained from then on, with the defaults for what it lacks."""
    model = net()
    first, second = halves(model)
    optimizer = make(model, [first], lr=0.01)
    train(model, optimizer, batches(2))
    assert_same(weights(model)[4:], weights(net())[4:], "parameters that were not given")
    optimizer.add_param_group({**second, **OWN})
    assert optimizer.param_groups[1]["lr"] == 0.01, "the group has not the default lr"
    train(model, optimizer, batches(2))
    assert all(moved(model)), "a parameter of the new group did not move"


def frozen(make: Make) -> None:
    """A parameter that needs no gradient stays, and is trained once it does."""
    model = net()
    model[0].weight.requires_grad_(False)
    optimizer = make(model, list(model.parameters()))
    train(model, optimizer, batches(2))
    assert_same(weights(model)[:1], weights(net())[:1], "a frozen parameter")
    model[0].weight.requires_grad_(True)
    train(model, optimizer, batches(2))
    assert not torch.equal(weights(model)[0], weights(net())[0]), "a thawed parameter stayed"


def schedules(make: Make) -> None:
    """Schedules of PyTorch set the rates they set for SGD; the loss falls, without a warning."""
    for name, schedule in SCHEDULES.items():
        model = net()
        optimizer = make(model, halves(model), lr=0.01)
        reference = SGD([{"params": nn.Linear(1, 1).parameters()}], lr=0.01, momentum=0.9)
        with warnings.catch_warnings(action="error"):
            both = schedule(optimizer), schedule(reference)
            found: list[tuple[float, float]] = []
            losses = []
            for batch in batches(24):
                losses += train(model, optimizer, [batch])
                reference.step()
                for scheduler in both:
                    is_plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
                    scheduler.step(*([losses[-1]] if is_plateau else []))
                for group in optimizer.param_groups:
                    found.append((group["lr"], reference.param_groups[0]["lr"]))
        wrong = [pair for pair in found if pair[0] != pair[1]]
        assert not wrong, f"{name}: lr, and that of SGD under it: {wrong[0]}"
        assert_falls(losses, name)


def first_rates(make: Make) -> None:
    """A rate that a schedule replaces before the first step does not matter."""
    runs = []
    for lr in (0.01, 1.0):
        model = net()
        optimizer = make(model, lr=lr)
        scheduler = lr_scheduler.OneCycleLR(optimizer, 0.01, 12)
        train(model, optimizer, batches(8), [scheduler])
        runs.append(weights(model))
    assert_same(runs[1], runs[0], "training under OneCycleLR with another lr before")


def tensor_rates(make: Make) -> None:
    """A rate may be a tensor: it trains alike, and schedules write into it."""
    for shape in ((), (1,)):
        runs = []
        for lr in (0.01, torch.full(shape, 0.01, dtype=torch.float64)):
            model = net()
            optimizer = make(model, lr=lr)
            scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
            train(model, optimizer, batches(5), [scheduler])
            runs.append(weights(model))
        assert_near(runs[1], runs[0], f"training at a rate of shape {list(shape)}")
        last = optimizer.param_groups[0]["lr"]
        assert isinstance(last, torch.Tensor), f"the rate became a {type(last).__name__}"
        assert abs(float(last) - 0.01 * 0.9**5) < 1e-6, f"the schedule ended at {float(last)}"


def resumed_schedules(make: Make) -> None:
    """A schedule goes on from its ``last_epoch`` by the groups that were loaded."""
    model = net()
    optimizer = make(model, lr=0.01)
    scheduler = lr_scheduler.StepLR(optimizer, 2, 0.5)
    train(model, optimizer, batches(5), [scheduler])
    fresh = make(net(), lr=0.01)
    fresh.load_state_dict(optimizer.state_dict())
    lr_scheduler.StepLR(fresh, 2, 0.5, last_epoch=scheduler.last_epoch)
    initial = fresh.param_groups[0].get("initial_lr")
    assert initial == 0.01, f"initial_lr: expected 0.01, got {initial}"


def one_bound(make: Make) -> None:
    """With weight decay on matrices alone, the usual recipe, the loss falls."""
    model = net()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 5e-3}, {"params": others, "weight_decay": 0.0}]
    assert_falls(train(model, make(model, groups), batches(40)), "decay on matrices alone")


ROWS = (
    *(number_and_order, own_keys, own_rates, own_decays, grouping, added_groups, frozen),
    *(schedules, first_rates, tensor_rates, resumed_schedules, one_bound),
)
