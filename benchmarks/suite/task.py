"""What a task is, and how one run of it goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.optimizers import state_tensors

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Task:
    """A model to train, on what, and how it is judged.

    Attributes:
        part: ``"development"``, for choosing defaults, or ``"held out"``, for reporting alone.
        model: A new model, with weights drawn from the global generator.
        batches: Training batches without end, from a seed and a batch size.
        held_out: Batches that were not trained on; equal for every run.
        loss: The number that is minimised, a mean over samples.
        metric: The loss that is reported, averaged over ``held_out``; ``loss`` if ``None``.
        steps: Length of a run.
        batch: Samples in a training batch.
    """

    part: str
    model: Callable[[], nn.Module]
    batches: Callable[[int, int], Iterator[Batch]]
    held_out: Callable[[], Iterable[Batch]]
    loss: Callable[[nn.Module, Batch], Tensor]
    metric: Callable[[nn.Module, Batch], Tensor] | None = None
    steps: int = 200
    batch: int = 32

    @torch.no_grad()
    def test_loss(self, model: nn.Module) -> float:
        """The mean of the metric over the held-out batches, in evaluation mode."""
        model.eval()
        metric = self.metric or self.loss
        losses = [metric(model, batch).double() for batch in self.held_out()]
        model.train()
        return torch.stack(losses).mean().item()


@dataclass(frozen=True)
class Run:
    """What one run ended with."""

    test_loss: float
    seconds: float  # of the training steps
    state_bytes: int


def train(
    task: Task,
    make_optimizer: Callable[[nn.Module], Any],
    *,
    seed: int = 0,
    steps: int | None = None,
    batch: int | None = None,
) -> Run:
    """Train a new model for ``steps`` batches and judge it."""
    torch.manual_seed(seed)
    model = task.model()
    optimizer = make_optimizer(model)
    steps = task.steps if steps is None else steps
    data, seconds = task.batches(seed, batch or task.batch), 0.0
    for _ in range(steps):
        examples = next(data)
        started = time.perf_counter()
        optimizer.zero_grad()
        task.loss(model, examples).backward()
        optimizer.step()
        seconds += time.perf_counter() - started
    state = sum(t.numel() * t.element_size() for t in state_tensors(optimizer))
    return Run(task.test_loss(model), seconds, state)
