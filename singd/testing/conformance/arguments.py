"""Rows about what a constructor takes, and what it refuses."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from singd.testing.conformance.training import (
    Make,
    assert_raises,
    assert_same,
    backward,
    batches,
    moved,
    net,
    trained,
    weights,
)

WRONG = TypeError, ValueError


def is_an_optimizer(make: Make) -> None:
    """It is a torch.optim.Optimizer, which schedulers and frameworks ask for."""
    optimizer = make(net())
    assert isinstance(optimizer, Optimizer), f"got a {type(optimizer).__name__}"


def one_tensor(make: Make) -> None:
    """One tensor as parameters is a TypeError."""
    model = net()
    with assert_raises((TypeError,), "one tensor as params"):
        make(model, next(model.parameters()))


def sets(make: Make) -> None:
    """A set as the parameters of a group, whose order is not reproducible, is a TypeError."""
    model = net()
    with assert_raises((TypeError,), "a set as the params of a group"):
        make(model, [{"params": set(model.parameters())}])


def nothing(make: Make) -> None:
    """An empty list of parameters is a ValueError."""
    with assert_raises((ValueError,), "an empty list as params"):
        make(net(), [])


def no_parameters(make: Make) -> None:
    """What is not a tensor, or not a leaf, is refused among parameters."""
    model = net()
    first = next(model.parameters())
    for params in ([3.0], ["weight"], [first * 2], [{"params": [None]}], 7):
        with assert_raises(WRONG, f"{params!r:.40} as params"):
            make(model, params)


def duplicates(make: Make) -> None:
    """A parameter in two groups is a ValueError; twice in one is at least a warning."""
    model = net()
    first = next(model.parameters())
    with assert_raises((ValueError,), "a parameter in two groups"):
        make(model, [{"params": [first]}, {"params": [first]}])
    optimizer = make(model, [first])
    with assert_raises((ValueError,), "a parameter added again"):
        optimizer.add_param_group({"params": [first]})
    twice = assert_raises((ValueError, UserWarning), "a parameter twice in one group")
    with warnings.catch_warnings(action="error"), twice:
        make(model, [first, first])


def half_named(make: Make) -> None:
    """Names are given to all parameters or to none."""
    model = net()
    a, b = model[0].weight, model[3].weight
    with assert_raises((ValueError,), "one parameter with a name and one without"):
        make(model, [("a", a), b])
    with assert_raises((ValueError,), "one group with names and one without"):
        make(model, [{"params": [a]}, {"params": [("b", b)]}])


def named(make: Make) -> None:
    """Named parameters are trained like parameters, and a group keeps the names."""
    plain, _ = trained(make, params=lambda model: list(model.parameters()))
    model, optimizer = trained(make, params=lambda model: list(model.named_parameters()))
    assert_same(weights(model), weights(plain), "training with named parameters")
    expected = [name for name, _ in model.named_parameters()]
    got = optimizer.param_groups[0].get("param_names")
    assert got == expected, f"param_names: expected {expected}, got {got}"


def iterators(make: Make) -> None:
    """A generator of parameters or of groups is taken, and read once."""

    def groups(model: nn.Sequential) -> Iterator[dict[str, Any]]:
        return ({"params": each.parameters()} for each in model if not isinstance(each, nn.Tanh))

    listed, _ = trained(make, params=lambda model: list(model.parameters()))
    generated, _ = trained(make, params=lambda model: model.parameters())
    assert_same(weights(generated), weights(listed), "training with a generator of parameters")
    grouped, _ = trained(make, params=groups)
    assert all(moved(grouped)), "a generator of groups: some parameters did not move"


def rates(make: Make) -> None:
    """A learning rate that is negative, no number, or has two elements is refused."""
    wrong = -0.1, "0.1", None, torch.tensor([0.1, 0.1]), torch.tensor(-0.1)
    for lr in wrong:
        with assert_raises(WRONG, f"lr={lr!r}"):
            make(net(), lr=lr)


def decays(make: Make) -> None:
    """A weight decay that is negative is refused."""
    with assert_raises((ValueError,), "weight_decay=-1"):
        make(net(), weight_decay=-1.0)


def unknown_options(make: Make) -> None:
    """An option that there is not is a TypeError."""
    with assert_raises((TypeError,), "an unknown option"):
        make(net(), no_such_option=1)


def refusals_leave_no_trace(make: Make) -> None:
    """A group that is refused changes nothing."""
    model = net()
    optimizer = make(model, list(model[0].parameters()))
    before = [set(group) for group in optimizer.param_groups]
    with assert_raises(WRONG, "a group with a parameter of another"):
        optimizer.add_param_group({"params": list(model.parameters())})
    assert [set(group) for group in optimizer.param_groups] == before, "groups changed"
    optimizer.add_param_group({"params": list(model[3].parameters())})
    backward(model, batches(1)[0])
    optimizer.step()


def printing(make: Make) -> None:
    """It prints its name and the options of its groups."""
    optimizer = make(net(), lr=0.0123)
    text = repr(optimizer)
    assert type(optimizer).__name__ in text, f"its name is not in {text!r}"
    assert "0.0123" in text, f"the learning rate is not in {text!r}"


ROWS = (
    *(is_an_optimizer, one_tensor, sets, nothing, no_parameters, duplicates, half_named, named),
    *(iterators, rates, decays, unknown_options, refusals_leave_no_trace, printing),
)
