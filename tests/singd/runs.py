"""Small training runs, and everything they leave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from singd.testing.conformance.training import tensors

F64 = torch.float64
Snapshot = dict[str, Tensor]


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> Snapshot:
    """Copies of all weights and of every tensor in the state of the optimizer."""
    return {name: t.detach().clone() for name, t in _everything(model, optimizer)}


def _everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, p in model.named_parameters():
        yield name, p
        for key, value in optimizer.state.get(p, {}).items():
            for i, t in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(t, Tensor):
                    yield f"{name} {key}[{i}]", t


def stored(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the state."""
    return sum(t.nbytes for t in tensors(optimizer.state))


def raw_bytes(state: Snapshot) -> dict[str, bytes]:
    """Every tensor to the bit."""
    return {
        k: t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for k, t in state.items()
    }


def distance(got: Snapshot, expected: Snapshot) -> float:
    """Largest relative difference, tensor by tensor; an error unless the tensors are the same."""
    assert got.keys() == expected.keys()
    assert any("K[0]" in name for name in got), "no factors were learned"
    return max(
        float((got[k].double() - expected[k].double()).norm() / (expected[k].double().norm() or 1))
        for k in got
    )


def factors(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[str, Tensor]:
    """The dense factors in the state of ``weight``."""
    return {k: v[0] for k, v in optimizer.state[weight].items() if isinstance(v, list)}


def running_mean(values: Sequence[float], momentum: float) -> float:
    """The mean of values of all steps so far, the last one first, with weights of a momentum."""
    weights = [momentum**k for k in range(len(values))]
    return sum(w * x for w, x in zip(weights, reversed(values), strict=True)) / sum(weights)


def mlp(dtype: torch.dtype = F64, seed: int = 0) -> nn.Sequential:
    """Two linear layers with an activation between; always the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def batches(
    count: int, *shape: int, dtype: torch.dtype = F64, seed: int = 1
) -> list[tuple[Tensor, Tensor]]:
    """Random inputs (``[8, 4]`` by default) and targets with three columns."""
    generator = torch.Generator().manual_seed(seed)
    shape = shape or (8, 4)
    return [
        (
            torch.randn(shape, generator=generator, dtype=dtype),
            torch.randn(*shape[:-1], 3, generator=generator, dtype=dtype),
        )
        for _ in range(count)
    ]


def mean_loss(output: Tensor, y: Tensor) -> Tensor:
    """Half the squared error, a mean over samples."""
    return 0.5 * (output - y).square().sum() / len(y)


def train(
    model: nn.Module, optimizer: Any, data: list[tuple[Tensor, Tensor]], loss: Any = mean_loss
) -> Snapshot:
    """The loop everybody writes."""
    for X, y in data:
        optimizer.zero_grad()
        loss(model(X), y).backward()
        optimizer.step()
    return snapshot(model, optimizer)
