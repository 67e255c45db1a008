"""Steps recorded once and replayed equal steps taken by Python."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from singd.ops import cuda_graph
from tests.singd.graphs import Graph
from tests.singd.paper import KFAC, SINGD

T = 2


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """The graph that is being recorded, if any, for what asks whether one is."""
    graphs: list[Graph] = []
    monkeypatch.setattr(cuda_graph, "is_capturing", lambda: bool(graphs))
    return graphs


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.LayerNorm(8),
        nn.Linear(8, 8),
        nn.Linear(8, 8, bias=False),
    ).to(dtype)


def iterate(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def replays(
    model: nn.Module,
    optimizer: Any,
    inputs: list[Tensor],
    recorded: list[Graph],
    before: Callable[[int], Any] = lambda number: None,
) -> list[Graph]:
    """Warm up, record one step of each kind, then replay in turn."""
    x, graphs = inputs[0].clone(), list[Graph]()
    for number, data in enumerate(inputs):
        before(number)
        x.copy_(data)
        if number < T:
            iterate(model, optimizer, x)
        elif number < 2 * T:
            recorded.append(Graph())
            with recorded[0]:
                iterate(model, optimizer, x)
            graphs.append(recorded.pop())
        else:
            graphs[number % T].replay()
    return graphs


METHODS: dict[str, Any] = {
    "dense": (SINGD, {}),
    "adamw": (SINGD, {"adamw": {"weight_decay": 0.1, "amsgrad": True}}),
    "diagonal": (SINGD, {"structures": ("diagonal", "diagonal"), "layers": "all"}),
    "hierarchical": (SINGD, {"structures": ("hierarchical(2,2)", "block_diagonal(3)")}),
    "lower Toeplitz": (SINGD, {"structures": ("lower_toeplitz", "diagonal"), "alpha1": 0.5}),
    "IKFAC": (SINGD, {"kfac_like": True, "normalize_lr_cov": True, "factor_clip": None}),
    "grafted": (SINGD, {"graft": "sgd", "kl_clip": None}),
    "KFAC": (KFAC, {}),
}


@pytest.mark.parametrize("method", METHODS)
def test_replays_are_steps(method: str, recorded: list[Graph]) -> None:
    kind, options = METHODS[method]
    model = network()
    inputs = list(torch.randn(9, 5, 2, 4, 4))
    reference = copy.deepcopy(model)
    optimizer = kind(reference, T=T, max_skipped=None, momentum=0.9, **options)
    for x in inputs:
        iterate(reference, optimizer, x)
    optimizer = kind(model, T=T, max_skipped=None, momentum=0.9, **options)
    replays(model, optimizer, inputs, recorded)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
        assert not torch.equal(p, torch.zeros_like(p))


def test_replays_follow_a_learning_rate_that_is_a_tensor(recorded: list[Graph]) -> None:
    model, inputs = network(), list(torch.randn(9, 5, 2, 4, 4))
    reference = copy.deepcopy(model)
    plain = SINGD(reference, T=T, lr=0.1, max_skipped=None)
    for number, x in enumerate(inputs):
        for group in plain.param_groups:
            group["lr"] = 0.1 / (1 + number)
        iterate(reference, plain, x)
    rate = torch.tensor(0.1)
    optimizer = SINGD(model, T=T, lr=rate, max_skipped=None)
    replays(model, optimizer, inputs, recorded, lambda i: rate.fill_(0.1 / (1 + i)))
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_a_learning_rate_that_is_a_tensor_is_saved(tmp_path: Path) -> None:
    model, inputs = network(), list(torch.randn(6, 5, 2, 4, 4))
    optimizer = SINGD(model, lr=torch.tensor(0.1))
    for x in inputs[:3]:
        iterate(model, optimizer, x)
    optimizer.param_groups[0]["lr"].fill_(0.05)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "saved")
    other = network()
    resumed = SINGD(other, lr=torch.tensor(0.3))
    saved = torch.load(tmp_path / "saved")
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for x in inputs[3:]:
        iterate(model, optimizer, x)
        iterate(other, resumed, x)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    assert float(resumed.param_groups[0]["peak_lr"]) == pytest.approx(0.1)


def test_no_step_of_the_burn_in_is_recorded(recorded: list[Graph]) -> None:
    """Its replays would update the factors in every step, by the step size of the burn-in."""
    model, x = network(), torch.randn(5, 2, 4, 4)
    optimizer = SINGD(model, max_skipped=None, burn_in=3)
    for left in (2, 1, 0):
        iterate(model, optimizer, x)
        before = [p.detach().clone() for p in model.parameters()]
        recorded.append(Graph())
        with recorded[0]:
            if left:
                with pytest.raises(RuntimeError, match="burn_in=0 or at least 3 steps before"):
                    iterate(model, optimizer, x)
            else:
                iterate(model, optimizer, x)
        recorded.pop()
        assert all(map(torch.equal, before, model.parameters())) == bool(left)


def test_replays_round_by_new_numbers(recorded: list[Graph]) -> None:
    model = network(torch.bfloat16)
    optimizer = SINGD(model, T=1, max_skipped=None)
    x = torch.randn(5, 2, 4, 4, dtype=torch.bfloat16)
    (graph, _) = replays(model, optimizer, [x] * 4, recorded)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    after = []
    for _ in range(2):
        model.load_state_dict(before)
        graph.replay()
        after.append([p.detach().clone() for p in model.parameters()])
    assert any(not torch.equal(p, q) for p, q in zip(*after, strict=True))


@pytest.mark.parametrize("option", [{"max_skipped": 3}, {"telemetry": print, "max_skipped": None}])
def test_what_needs_the_host_is_refused(option: dict[str, Any], recorded: list[Graph]) -> None:
    model = network()
    optimizer = SINGD(model, **option)
    iterate(model, optimizer, torch.randn(5, 2, 4, 4))
    before = copy.deepcopy(model.state_dict())
    recorded.append(Graph())
    with pytest.raises(RuntimeError, match="expected max_skipped=None and telemetry=None"):
        iterate(model, optimizer, torch.randn(5, 2, 4, 4))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_the_graph_sees_what_would_wait() -> None:
    with pytest.raises(AssertionError, match="waits"), Graph():
        torch.ones(2).sum().item()
    with pytest.raises(AssertionError, match="waits"), Graph():
        torch.tensor([1.0])
    with pytest.raises(AssertionError, match="generator"), Graph():
        torch.rand(2, generator=torch.Generator())
