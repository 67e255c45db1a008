"""A small network, and the steps in which the laws of methods train it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from singd.optimizer import KroneckerOptimizer
from singd.testing.conformance import training as conformance

TOLERANCE = 1e-9
"""Relative difference of numbers in float64 that rounding may explain."""


def network() -> nn.Sequential:
    """The same network each time, its last layer without a bias."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(2, 3, 3),
            nn.Flatten(),
            nn.Linear(12, 5),
            nn.Tanh(),
            nn.Linear(5, 5),
            nn.Tanh(),
            nn.Linear(5, 5),
            nn.Tanh(),
            nn.Linear(5, 3, bias=False),
        ).double()


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """Random inputs ``[8, 2, 4, 4]`` and targets ``[8, 3]``."""
    return [
        (torch.randn(8, 2, 4, 4, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64))
        for _ in range(count)
    ]


def backward(model: nn.Module, x: Tensor, y: Tensor, weight: float = 1.0) -> Tensor:
    """``weight`` times the mean squared error of a batch, and its gradients."""
    loss = weight * (model(x) - y).square().mean()
    loss.backward()
    return loss.detach()


def train(
    model: nn.Module,
    optimizer: KroneckerOptimizer,
    data: Sequence[tuple[Tensor, Tensor]],
    each: bool = False,
) -> None:
    """One step on all batches, or on each of them."""
    for some in [[batch] for batch in data] if each else [data]:
        optimizer.zero_grad()
        for x, y in some:
            backward(model, x, y, 1 / len(some))
        optimizer.step()


def grad(p: Tensor) -> Tensor:
    """The gradient, which is there."""
    if p.grad is None:
        raise AssertionError("expected a gradient, got none")
    return p.grad


def tensors(entry: Mapping[str, Any]) -> list[Tensor]:
    """Copies of the tensors in the state of a parameter."""
    return [t.detach().clone() for t in conformance.tensors(dict(entry))]


def assert_same(
    what: str, expected: Sequence[Tensor], got: Sequence[Tensor], exactly: bool = False
) -> None:
    """Raise unless all tensors are the same to :data:`TOLERANCE`, or to the bit."""
    if len(expected) != len(got):
        raise AssertionError(f"{what}: expected {len(expected)} tensors, got {len(got)}")
    for number, (e, g) in enumerate(zip(expected, got, strict=True)):
        e, g = e.detach().double(), g.detach().double()
        difference = float((e - g).norm() / e.norm().clamp(min=1e-30))
        if e.shape != g.shape or not difference <= (0.0 if exactly else TOLERANCE):
            raise AssertionError(
                f"{what}: expected the same tensor {number}, got a relative difference of "
                f"{difference:.1e}"
            )
