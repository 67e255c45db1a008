"""Rows about what a step does to parameters and gradients."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from singd.testing.conformance.training import (
    Make,
    assert_falls,
    assert_same,
    backward,
    batches,
    moved,
    net,
    train,
    weights,
)


def learns(make: Make) -> None:
    """The loss falls, with and without weight decay."""
    for options in ({}, {"weight_decay": 1e-3}):
        model = net()
        losses = train(model, make(model, **options), batches(40))
        assert_falls(losses, f"options {options}")


def without_gradients(make: Make) -> None:
    """A step without any gradient changes nothing."""
    model = net()
    optimizer = make(model, weight_decay=0.1)
    optimizer.step()
    assert_same(weights(model), weights(net()), "parameters without a gradient")
    train(model, optimizer, batches(1))
    optimizer.zero_grad()
    before = weights(model)
    optimizer.step()
    assert_same(weights(model), before, "parameters without a gradient after a step")


def some_gradients(make: Make) -> None:
    """Where some parameters have a gradient only those move."""
    model = net()
    optimizer = make(model, weight_decay=0.1)
    backward(model, batches(1)[0])
    for place, p in enumerate(model.parameters()):
        if place in (0, 1, 3):
            p.grad = None
    optimizer.step()
    got = moved(model)
    assert got == [False, False, True, False, True, True], f"moved: {got}"


def zero_gradients(make: Make) -> None:
    """Gradients of zero move nothing, without weight decay."""
    model = net()
    optimizer = make(model, weight_decay=0.0)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert_same(weights(model), weights(net()), "parameters with gradients of zero")


def gradients_stay(make: Make) -> None:
    """A step writes to no gradient."""
    model = net()
    optimizer = make(model, weight_decay=0.1)
    for batch in batches(3):
        optimizer.zero_grad()
        backward(model, batch)
        grads = [p.grad for p in model.parameters()]
        before = [(g, g.clone(), g._version) for g in grads if g is not None]
        optimizer.step()
        for p, (g, value, version) in zip(model.parameters(), before, strict=True):
            assert p.grad is g, "a gradient was replaced"
            assert torch.equal(g, value), "a gradient changed"
            assert g._version == version, "a gradient was written to"


def resetting(make: Make) -> None:
    """``zero_grad`` removes gradients, or sets them to zero, and training is the same."""
    runs = []
    for set_to_none in (True, False):
        model = net()
        optimizer = make(model)
        for batch in batches(4):
            optimizer.zero_grad(set_to_none)
            grads = [p.grad for p in model.parameters()]
            assert all(g is None if set_to_none else g is None or not g.any() for g in grads)
            backward(model, batch)
            optimizer.step()
        runs.append(weights(model))
    assert_same(runs[1], runs[0], "training with gradients set to zero")


def empty_parameters(make: Make) -> None:
    """Parameters without numbers do no harm."""
    with warnings.catch_warnings(action="ignore"):  # nothing to initialise
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 0), nn.Linear(0, 3)).double()
    with warnings.catch_warnings(action="error"):
        optimizer = make(model)
        train(model, optimizer, batches(3))
    assert all(bool(p.isfinite().all()) for p in model.parameters()), "not finite"


def closures(make: Make) -> None:
    """A closure is called once, with gradients enabled, and its result returned as it is."""
    model = net()
    optimizer: Any = make(model)
    calls: list[bool] = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        return backward(model, batches(1)[0])

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True], f"expected one call with gradients enabled, got {calls}"
    assert isinstance(loss, Tensor), f"expected the loss, got {loss!r}"
    other = net()
    expected = make(other)
    train(other, expected, batches(1))
    assert_same(weights(model), weights(other), "a step with a closure")
    for value in (1.0, None, {"loss": 2.0}):
        got = optimizer.step(lambda value=value: value)
        assert got is value, f"expected {value!r}, got {got!r}"
    assert optimizer.step() is None, "a step without a closure returned something"


def contexts(make: Make) -> None:
    """It does not matter whether gradients are enabled around a step."""
    runs = []
    for context in (torch.enable_grad, torch.no_grad):
        model = net()
        optimizer = make(model)
        for batch in batches(3):
            optimizer.zero_grad()
            backward(model, batch)
            with context():
                optimizer.step()
        assert all(p.requires_grad and p.grad_fn is None for p in model.parameters())
        runs.append(weights(model))
    assert_same(runs[1], runs[0], "steps under no_grad")


def random_numbers(make: Make) -> None:
    """Neither construction nor a step draws from the global generator."""
    model = net(torch.bfloat16)
    before = torch.get_rng_state()
    optimizer = make(model)
    train(model, optimizer, batches(2, torch.bfloat16))
    assert torch.equal(torch.get_rng_state(), before), "the global generator moved on"


ROWS = (
    *(learns, without_gradients, some_gradients, zero_gradients, gradients_stay, resetting),
    *(empty_parameters, closures, contexts, random_numbers),
)
