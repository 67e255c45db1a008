"""A model that was compiled and called before the optimizer was made: the warning says that."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from singd import SINGD

X, TARGETS = torch.randn(24, 6, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3
HINT = "0.weight, 2.weight: the model was compiled and called before the optimizer was made"


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def whole(model):
    return torch.compile(model, backend="aot_eager")


def in_place(model):
    model.compile(backend="aot_eager")
    return model


def a_function(model):
    return torch.compile(lambda X: model(X), backend="aot_eager")


def train(optimizer, call, steps=3):
    """What the optimizer says meanwhile."""
    with warnings.catch_warnings(record=True, action="always") as record:
        for _ in range(steps):
            optimizer.zero_grad()
            cross_entropy(call(X), TARGETS).backward()
            optimizer.step()
    return [str(one.message) for one in record if "AdamW" in str(one.message)]


@pytest.mark.parametrize("way", [whole, a_function])
def test_after_its_first_call(way):
    model = net()
    call = way(model)
    cross_entropy(call(X), TARGETS).backward()
    (said,) = train(SINGD(call if isinstance(call, nn.Module) else model), call)
    assert said.startswith(HINT)


def test_module_compile_notices_the_hooks():
    model = in_place(net())
    model(X)
    assert train(SINGD(model), model) == []


@pytest.mark.parametrize("way", [whole, in_place, a_function])
def test_before_its_first_call_nothing_is_said(way):
    model = net()
    call = way(model)
    assert train(SINGD(model), call) == []


def test_the_advice_helps():
    model = net()
    call = whole(model)
    call(X)
    torch.compiler.reset()
    optimizer = SINGD(model)
    assert train(optimizer, call) == []


def test_where_nothing_was_compiled_it_is_not_mentioned():
    model = net()
    first, _, last = model

    def call(X):
        return last(torch.tanh(X @ first.weight.T + first.bias))

    (said,) = train(SINGD(model), call)
    assert said.startswith("0.weight: the weight is used without its module being called; AdamW")
