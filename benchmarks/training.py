"""Train one of the models by one of the methods: the loop of the demo."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import nan

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.data import TRAIN_SIZE, Digits, load
from benchmarks.models import MODELS
from benchmarks.nets import DTYPES

BATCH = 64

MakeOptimizer = Callable[[nn.Module], Optimizer]


@dataclass
class History:
    """What one run leaves."""

    losses: list[float] = field(default_factory=list)  # of the batch, at every step
    steps: list[int] = field(default_factory=list)  # at which the accuracy was measured
    accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0  # of training, without the measurements

    @property
    def accuracy(self) -> float:
        """The last accuracy, on digits that were held out."""
        return self.accuracies[-1] if self.accuracies else nan


def steps_of(epochs: int) -> int:
    """Steps of as many epochs of the demonstration; the last, smaller batch is left out."""
    return epochs * (TRAIN_SIZE["demo"] // BATCH)


def batches(digits: Digits, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled mini-batches, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while done < steps:
        order = torch.randperm(len(digits.labels), generator=generator)
        for index in order.split(BATCH)[: min(len(order) // BATCH, steps - done)]:
            yield digits.images[index], digits.labels[index]
            done += 1


def build(model: str, precision: str, seed: int) -> nn.Module:
    """A model with weights drawn from ``seed``; equal for all methods."""
    torch.manual_seed(seed)
    return MODELS[model]().to(DTYPES[precision])


def backward(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The mean loss, after adding its gradients. The loss itself is in float32."""
    logits = model(images.to(next(model.parameters()).dtype))
    loss = nn.functional.cross_entropy(logits.float(), labels)
    loss.backward()
    return loss.detach()


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """The share of digits that ``model`` names."""
    logits = model(digits.images.to(next(model.parameters()).dtype))
    return (logits.argmax(-1) == digits.labels).double().mean().item()


def train(
    model_name: str,
    make_optimizer: MakeOptimizer,
    *,
    precision: str = "fp32",
    split: str = "demo",
    steps: int,
    seed: int = 0,
    checks: int = 1,
) -> History:
    """Train for ``steps`` mini-batches; measure the held-out accuracy ``checks`` times."""
    digits, held_out = load(split)
    model = build(model_name, precision, seed)
    optimizer = make_optimizer(model)
    history = History()
    due = {steps * (k + 1) // checks for k in range(checks)}
    for step, (images, labels) in enumerate(batches(digits, steps, seed), 1):
        started = time.perf_counter()
        optimizer.zero_grad()
        loss = backward(model, images, labels)
        optimizer.step()
        history.seconds += time.perf_counter() - started
        history.losses.append(loss.item())
        if step in due:
            history.steps.append(step)
            history.accuracies.append(accuracy(model, held_out))
    return history
