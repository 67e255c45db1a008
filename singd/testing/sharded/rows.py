"""What every optimizer of sharded models must do: end where one process ends.

Every row trains a small net, on a rank or in one process, and returns what it ends with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from singd.ops.dtensor import local, whole
from singd.testing.conformance.training import Make
from singd.testing.sharded.setting import Ends, Setting, batches, net


def snapshot(model: Any, optimizer: Any) -> Ends:
    """Copies of all weights and of every tensor in the state of an optimizer, whole."""
    for module in model.modules():
        if hasattr(module, "reshard"):  # under FSDP2 it may have its whole parameters
            module.reshard()
    found = {name: whole(p).detach().clone() for name, p in model.named_parameters()}
    names = {p: name for name, p in model.named_parameters()}
    saved = optimizer.state_dict()  # some rank may have state that others have not
    for group, numbered in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for p, number in zip(group["params"], numbered["params"], strict=True):
            for key, value in saved["state"].get(number, {}).items():
                for i, t in (value if isinstance(value, dict) else {0: value}).items():
                    if isinstance(t, Tensor):
                        found[f"{names[p]} {key}[{i}]"] = whole(t).detach().clone()
    return found


def trained(
    make: Make,
    setting: Setting,
    model: Any,
    before: Callable[[int], Any] = lambda step: None,
    **shares: Any,
) -> Ends:
    """A model is trained; ``before`` is called before every step, with its number."""
    optimizer = make(model)
    for step, (X, y) in enumerate(batches()):
        optimizer.zero_grad()
        setting.backward(model, X, y, **shares)
        before(step)
        optimizer.step()
    return snapshot(model, optimizer)


def uneven_shares(make: Make, setting: Setting) -> Ends:
    """Ranks have different numbers of samples, and parameters fewer rows than there are ranks."""
    return trained(make, setting, setting.shard(net()))


def a_rank_without_samples(make: Make, setting: Setting) -> Ends:
    """The last rank has none."""
    return trained(make, setting, setting.shard(net()), empty=True)


def passes_that_are_not_reduced(make: Make, setting: Setting) -> Ends:
    """Three backward passes a step, the last of which reduces all gradients."""
    model = setting.shard(net())
    optimizer = make(model)
    for X, y in batches():
        optimizer.zero_grad()
        for share in setting.shares():
            for part in range(3):
                setting.synchronise(model, part == 2)
                some = slice(share.start + part, share.stop, 3)
                setting.loss(model(X[some]), y[some]).backward()
        optimizer.step()
    return snapshot(model, optimizer)


def dropped_passes(make: Make, setting: Setting) -> Ends:
    """Gradients are reset, by the optimizer or by the model, and computed anew."""
    model = setting.shard(net())
    optimizer = make(model)
    for step, (X, y) in enumerate(batches()):
        setting.backward(model, 3 * X.flip(0), y)
        (model if step % 2 else optimizer).zero_grad()
        setting.backward(model, X, y)
        optimizer.step()
        optimizer.zero_grad()
    return snapshot(model, optimizer)


def resets_before_the_reduction(make: Make, setting: Setting) -> Ends:
    """``zero_grad`` leaves gradients alone that are yet to be reduced: FSDP2 keeps them."""
    model = setting.shard(net())
    optimizer = make(model)
    for X, y in batches():
        setting.synchronise(model, False)
        setting.backward(model, X, y)
        if setting.layout is not None:
            optimizer.zero_grad()
        setting.synchronise(model, True)
        setting.backward(model, -2 * X, y)
        optimizer.step()
        optimizer.zero_grad()
    return snapshot(model, optimizer)


def evaluation(make: Make, setting: Setting, **options: Any) -> Ends:
    """The model is evaluated between the backward pass and the step, and after it."""
    model = setting.shard(net(), **options)
    optimizer = make(model)
    for X, y in batches():
        optimizer.zero_grad()
        setting.backward(model, X, y)
        with torch.no_grad():
            model(X)
        optimizer.step()
        with torch.no_grad():
            model(X)
    return snapshot(model, optimizer)


def parameters_that_are_not_sharded(make: Make, setting: Setting) -> Ends:
    """:func:`fully_shard` leaves some alone: nobody else averages their gradients."""
    model: Any = net()
    kept = {model[3].weight, model[1].norm.weight}
    setting.shard(model, ignored_params=kept)
    return trained(make, setting, model)


def a_gradient_that_is_not_finite(make: Make, setting: Setting) -> Ends:
    """One number on one rank: all of them do as one process does."""
    model = setting.shard(net())

    def spoil(step: int) -> None:
        spoiled = (None, model[0].weight, model[1].norm.bias, None)[step]
        if spoiled is not None and setting.is_first:
            local(spoiled.grad).view(-1)[0] = float("nan")

    return trained(make, setting, model, spoil)


def clipped_gradients(make: Make, setting: Setting) -> Ends:
    """By PyTorch, as DTensors."""
    model = setting.shard(net())
    return trained(make, setting, model, lambda _: clip_grad_norm_(model.parameters(), 0.1))


def noise(make: Make, setting: Setting) -> Ends:
    """In bfloat16, all ranks with the same samples: what is rounded by chance is the same."""
    model = setting.shard(net(torch.bfloat16))
    optimizer = make(model)
    for X, y in batches(dtype=torch.bfloat16):
        optimizer.zero_grad()
        ((model(X) - y).float().square().sum() / 16).backward()
        optimizer.step()
    return snapshot(model, optimizer)


Row = Callable[[Make, Setting], Ends]

ROWS: tuple[Row, ...] = (
    uneven_shares,
    a_rank_without_samples,
    passes_that_are_not_reduced,
    dropped_passes,
    resets_before_the_reduction,
    evaluation,
    parameters_that_are_not_sharded,
    a_gradient_that_is_not_finite,
    clipped_gradients,
    noise,
)
TOLERANCES: dict[Row, float] = {noise: 1e-2}
"""Rows that allow another difference: few of all numbers may be rounded the other way."""
