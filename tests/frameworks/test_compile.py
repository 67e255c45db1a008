"""``torch.compile`` of the model: the hooks run between compiled pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from tests.frameworks.data import by_hand, digits, loader
from tests.singd.paper import SINGD
from tests.singd.runs import distance, snapshot

# Dynamo looks at .grad of what goes from one compiled piece to the next.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Graphs of tests before count no more: a process may have compiled others."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def net() -> nn.Sequential:
    """Enough layers that one compilation for each call of a layer would pass the limit of eight."""
    torch.manual_seed(0)
    hidden = [layer for _ in range(9) for layer in (nn.Linear(12, 12), nn.LayerNorm(12), nn.Tanh())]
    convolution = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 3, 3, 2), nn.Flatten())
    return nn.Sequential(convolution, nn.Linear(27, 12), *hidden, nn.Linear(12, 10))


def made(model: nn.Module) -> SINGD:
    return SINGD(model, lr=0.05, T=2, kl_clip=1e-2)


def before(backend: str) -> tuple[Any, Any, Any]:
    model = net()
    compiled = torch.compile(model, backend=backend)
    return model, compiled, made(model)


def given(backend: str) -> tuple[Any, Any, Any]:
    model = net()
    compiled = torch.compile(model, backend=backend)
    return model, compiled, made(compiled)


def after(backend: str) -> tuple[Any, Any, Any]:
    model = net()
    optimizer = made(model)
    return model, torch.compile(model, backend=backend), optimizer


def in_place(backend: str) -> tuple[Any, Any, Any]:
    model = net()
    optimizer = made(model)
    model.compile(backend=backend)
    return model, model, optimizer


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("order", [before, given, after, in_place])
def test_a_compiled_model_trains_alike(order: Callable[..., Any], backend: str) -> None:
    expected = by_hand((plain := net()), made(plain), list(loader(6)))
    model, compiled, optimizer = order(backend)
    by_hand(compiled, optimizer, list(loader(2)))
    compilations = counters["stats"]["unique_graphs"]
    assert 0 < compilations < 12  # a graph for each kind of layer, not for each layer
    by_hand(compiled, optimizer, list(loader(6))[2:])
    assert counters["stats"]["unique_graphs"] == compilations
    assert distance(snapshot(model, optimizer), expected) == 0.0
    assert not any("_orig_mod" in row.parameter for row in optimizer.plan().rows)


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
@pytest.mark.parametrize(
    ("structures", "backend"),
    [(("dense", "diagonal"), "aot_eager"), (("hierarchical(3, 2)", "lower_toeplitz"), "eager")],
)
def test_a_compiled_step_trains_alike(structures: tuple[str, str], backend: str) -> None:
    """As PyTorch's optimizers are compiled; once, for steps of both kinds.

    In float64: PyTorch decomposes what it compiles, so the last digits are others. Few layers, two
    of them equal: compiling takes ten seconds for each.
    """

    def few() -> nn.Sequential:
        torch.manual_seed(0)
        hidden = nn.LayerNorm(10), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 10)
        return nn.Sequential(nn.Linear(64, 10), *hidden).double()

    eager, model = few(), few()
    options: dict[str, Any] = {"T": 2, "structures": structures, "alpha1": 0.5}
    expected, optimizer = SINGD(eager, **options), SINGD(model, **options)
    step, compilations = torch.compile(optimizer.step, backend=backend), []
    for inputs, targets in loader(6):
        for each, of, take in ((eager, expected, expected.step), (model, optimizer, step)):
            of.zero_grad()
            nn.functional.cross_entropy(each(inputs.double()), targets).backward()
            take()
        compilations.append(counters["stats"]["unique_graphs"])
    assert distance(snapshot(model, optimizer), snapshot(eager, expected)) <= 1e-12
    assert 0 < compilations[2] == compilations[-1]


def test_what_was_compiled_without_the_hooks_is_noticed() -> None:
    model = net()
    compiled = torch.compile(model, backend="eager")
    X, y = digits()
    compiled(X[:16])
    optimizer = made(model)
    nn.functional.cross_entropy(compiled(X[:16]), y[:16]).backward()
    with pytest.warns(UserWarning, match="AdamW trains it instead") as warned:
        optimizer.step()
    assert len(warned) == 1
    assert str(warned[0].message).count(".weight") == 12
    assert all("exp_avg" in optimizer.state[p] for p in model.parameters())
