"""What PyTorch has for any optimizer: schedules, averages of weights, hooks, groups."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer, lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from tests.frameworks.data import by_hand, classifier, digits, loader
from tests.singd.paper import SINGD
from tests.singd.runs import distance, snapshot


def made(net: nn.Module) -> SINGD:
    return SINGD(net, lr=0.05, T=2, kl_clip=1e-2, adamw={"lr": 0.01})


SCHEDULES: dict[str, Any] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 3], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.05, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.05, 8),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)], o
    ),
    "SWALR": lambda o: SWALR(o, 0.02, 3),
}


def test_no_schedule_of_pytorch_is_missing() -> None:
    classes = {
        n for n, c in vars(lr_scheduler).items() if inspect.isclass(c) and hasattr(c, "step")
    }
    classes = {n for n in classes if issubclass(getattr(lr_scheduler, n), lr_scheduler.LRScheduler)}
    assert classes - {"LRScheduler", "_LRScheduler"} == SCHEDULES.keys() - {"SWALR"}


class Scheduled:
    """A schedule, stepped as :func:`by_hand` does; remembers what it set."""

    def __init__(self, name: str, optimizer: Optimizer) -> None:
        self.inner, self.optimizer = SCHEDULES[name](optimizer), optimizer
        self.rates: list[Any] = []

    def step(self) -> None:
        self.inner.step(*([1.0] if isinstance(self.inner, lr_scheduler.ReduceLROnPlateau) else []))
        options = [(g["lr"], g.get("momentum")) for g in self.optimizer.param_groups]
        self.rates.append(options)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_followed_and_resume(name: str) -> None:
    net = classifier()
    optimizer = made(net)
    scheduler = Scheduled(name, optimizer)
    whole = by_hand(net, optimizer, list(loader(8)), scheduler=scheduler)

    sgd = SGD([{"params": nn.Linear(1, 1).parameters(), "lr": lr} for lr in (0.05,)], 1.0, 0.9)
    reference = Scheduled(name, sgd)
    by_hand(nn.Sequential(), sgd, [], scheduler=reference)
    for _ in range(8):
        sgd.step()
        reference.step()
    assert scheduler.rates == reference.rates

    net = classifier()
    optimizer = made(net)
    scheduler = Scheduled(name, optimizer)
    by_hand(net, optimizer, list(loader(3)), scheduler=scheduler)
    saved = [m.state_dict() for m in (net, optimizer, scheduler.inner)]
    net = classifier()
    optimizer = made(net)
    scheduler = Scheduled(name, optimizer)
    for part, state in zip((net, optimizer, scheduler.inner), saved, strict=True):
        part.load_state_dict(state)
    rest = by_hand(net, optimizer, list(loader(8))[3:], scheduler=scheduler)
    assert distance(rest, whole) == 0.0


# Averages of weights ------------------------------------------------------------------------------


def normalized() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 10))


@pytest.mark.parametrize("decay", [None, 0.7])
def test_averages_of_weights_do_not_disturb(decay: float | None) -> None:
    plain = normalized()
    expected = by_hand(plain, made(plain), list(loader(8)))
    model = normalized()
    optimizer = made(model)
    averaging = {} if decay is None else {"multi_avg_fn": get_ema_multi_avg_fn(decay)}
    averaged = AveragedModel(model, **averaging)
    by_us: list[torch.Tensor] = []
    for i, batch in enumerate(loader(8)):
        by_hand(model, optimizer, [batch])
        averaged.update_parameters(model)
        weight = model[0].weight.detach()
        share = 1 / (i + 1) if decay is None else 1 - decay if i else 1.0
        by_us = [weight.clone() if not by_us else by_us[0].lerp(weight, share)]
        nn.functional.cross_entropy(averaged(batch[0]), batch[1]).backward()  # leaves no trace
        update_bn(loader(2), averaged)
    assert distance(snapshot(model, optimizer), expected) == 0.0
    torch.testing.assert_close(averaged.module[0].weight.detach(), by_us[0])
    X, _ = digits()
    hidden = averaged.module[0](X[:32])
    torch.testing.assert_close(averaged.module[1].running_mean, hidden.mean(0))


# Hooks and groups ---------------------------------------------------------------------------------


@pytest.fixture
def trained() -> tuple[nn.Module, SINGD]:
    net = classifier()
    optimizer = made(net)
    by_hand(net, optimizer, list(loader(3)))
    return net, optimizer


def test_hooks_of_the_step_run_once_around_it(trained: tuple[nn.Module, SINGD]) -> None:
    net, optimizer = trained
    calls: list[tuple[str, bool]] = []
    start = net[0].weight.detach().clone()

    def note(name: str) -> Any:
        def hook(given: Any, args: Any, kwargs: Any) -> None:
            assert given is optimizer
            calls.append((name, torch.equal(net[0].weight, start)))

        return hook

    optimizer.register_step_pre_hook(note("before"))
    handle = optimizer.register_step_post_hook(note("after"))
    by_hand(net, optimizer, list(loader(1)))
    handle.remove()
    by_hand(net, optimizer, list(loader(1)))
    assert calls == [("before", True), ("after", False), ("before", False)]


def test_hooks_of_the_state(trained: tuple[nn.Module, SINGD]) -> None:
    _, optimizer = trained
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("save"))
    optimizer.register_state_dict_post_hook(lambda o, state: calls.append(len(state["state"])))
    optimizer.register_load_state_dict_pre_hook(lambda o, state: calls.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["save", 8, "load", "loaded"]


def test_what_a_framework_adds_to_a_group_is_kept(trained: tuple[nn.Module, SINGD]) -> None:
    net, optimizer = trained
    (group,) = optimizer.param_groups
    group["name"] = "all"
    by_hand(net, optimizer, list(loader(1)))
    fresh = made(net)
    fresh.load_state_dict(optimizer.state_dict())
    assert [group["name"] for group in fresh.param_groups] == ["all"]


@pytest.mark.parametrize("rate", [0.0, 0.02])
def test_a_group_that_is_replaced_counts_from_then_on(rate: float) -> None:
    runs = []
    for replaced in (False, True):
        net = classifier()
        optimizer = made(net)
        by_hand(net, optimizer, list(loader(3)))
        for i, group in enumerate(optimizer.param_groups):
            if replaced:
                optimizer.param_groups[i] = {**group, "lr": rate}
            else:
                group["lr"] = rate
        runs.append(by_hand(net, optimizer, list(loader(6))[3:]))
    assert distance(runs[1], runs[0]) == 0.0


def test_a_parameter_taken_out_of_its_group_is_an_error(trained: tuple[nn.Module, SINGD]) -> None:
    net, optimizer = trained
    before = snapshot(net, optimizer)
    del optimizer.param_groups[0]["params"][0]
    with pytest.raises(ValueError, match=r"param_groups: expected .* requires_grad_\(False\)"):
        by_hand(net, optimizer, list(loader(1)))
    assert distance(snapshot(net, optimizer), before) == 0.0


def test_a_model_that_resets_gradients_forgets_what_came_with_them() -> None:
    runs = []
    for reset in ("optimizer", "model"):
        net = classifier()
        optimizer = made(net)
        for X, y in loader(4):
            for k in (2, 1):  # the first pass is dropped, as after an overflow
                (optimizer if reset == "optimizer" else net).zero_grad()
                optimizer.count_terms(len(y) // k)
                nn.functional.cross_entropy(net(X)[::k], y[::k]).backward()
            optimizer.step()
        runs.append(snapshot(net, optimizer))
    assert distance(runs[1], runs[0]) == 0.0


@pytest.mark.parametrize("first", ["count", "reset"])
def test_terms_may_be_counted_before_gradients_are_reset(first: str) -> None:
    net = classifier()
    optimizer = made(net)
    for X, y in loader(4):
        for k in (2, 3):  # the first of the passes is dropped
            loss = nn.functional.cross_entropy(net(X)[::k], y[::k])
            if first == "count":
                optimizer.count_terms(len(y[::k]))
            optimizer.zero_grad()
            if first == "reset":
                optimizer.count_terms(len(y[::k]))
            loss.backward()
        optimizer.step()
    plain = classifier()
    expected = made(plain)
    for X, y in loader(4):
        expected.zero_grad()
        expected.count_terms(len(y[::3]))
        nn.functional.cross_entropy(plain(X)[::3], y[::3]).backward()
        expected.step()
    assert distance(snapshot(net, optimizer), snapshot(plain, expected)) == 0.0
