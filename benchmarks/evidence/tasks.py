"""The tasks of the comparison: four held-out ones of the suite, and three that stand here alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import nets
from benchmarks.suite import TASKS as SUITE
from benchmarks.suite.autoencoders import network
from benchmarks.suite.language import TOKENS, held_out, next_character, plain
from benchmarks.suite.sampling import LENGTH, windows
from benchmarks.suite.task import Batch, Task
from benchmarks.suite.vision import classes, labelled, labelled_test

Half = Literal["validation", "test"]


def halves(batches: Iterable[Batch], half: Half) -> list[Batch]:
    """Every other sample of what is held out."""
    start = {"validation": 0, "test": 1}[half]
    return [tuple(t[start::2] for t in batch) for batch in batches]


@torch.no_grad()
def judge(task: Task, model: nn.Module, half: Half) -> float:
    """The mean of the metric over one half of what is held out, in evaluation mode."""
    model.eval()
    metric = task.metric or task.loss
    parts = halves(task.held_out(), half)
    losses = torch.tensor([float(metric(model, part)) for part in parts], dtype=torch.float64)
    sizes = torch.tensor([len(part[0]) for part in parts], dtype=torch.float64)
    model.train()
    return float((losses * sizes).sum() / sizes.sum())


def cnn() -> nn.Module:
    """VGG in small: four convolutions with batch normalization, for images of 14 pixels."""
    layers: list[nn.Module] = []
    channels = 1
    for width in (16, 32):
        for _ in range(2):
            conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 9, 64), nn.ReLU(), nn.Linear(64, 10))


# The heat equation -------------------------------------------------------------------------------

DIFFUSION, STEP = 0.1, 0.05


def heat(points: Tensor) -> Tensor:
    """Two modes of ``u_t = DIFFUSION u_xx`` on [0, 1] with ``u = 0`` at both ends."""
    x, t = points.T
    slow, fast = (k**2 * math.pi**2 * DIFFUSION for k in (1, 3))
    first = torch.sin(math.pi * x) * torch.exp(-slow * t)
    return first + 0.5 * torch.sin(3 * math.pi * x) * torch.exp(-fast * t)


def residual(model: nn.Module, batch: Batch) -> Tensor:
    """The equation by central differences, and where ``u`` is given: at both ends, at first."""
    inside, border = batch
    dx, dt = STEP * torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    around = model(torch.cat([inside + dx, inside - dx, inside + dt, inside - dt, inside]))
    right, left, later, before, here = around[:, 0].chunk(5)
    rate, bend = (later - before) / (2 * STEP), (right + left - 2 * here) / STEP**2
    known = model(border)[:, 0] - heat(border)
    return (rate - DIFFUSION * bend).square().mean() + 10 * known.square().mean()


def places(seed: int, size: int) -> Iterator[Batch]:
    """Points inside, and as many of the border."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        inside, border = torch.rand(2, size, 2, generator=generator)
        side = torch.arange(size) % 4
        border[side == 0, 0], border[side == 1, 0] = 0.0, 1.0
        border[side > 1, 1] = 0.0
        yield inside, border


def grid() -> list[Batch]:
    line = torch.linspace(0, 1, 33)
    return [(torch.cartesian_prod(line, line),)]


def error(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0])[:, 0], heat(batch[0]))


def texts(seed: int, size: int) -> Iterator[Batch]:
    return ((text,) for text in windows(seed, size))


PART = "held out"
TASKS: dict[str, Task] = {
    "CNN with batch norm": Task(PART, cnn, labelled, labelled_test, classes, steps=150),
    "vision transformer": SUITE["compact transformer"],
    "character GPT": SUITE["Llama"],
    "graph attention": SUITE["graph attention"],
    "deep autoencoder": SUITE["autoencoder, mean MSE"],
    "PINN, heat equation": Task(
        PART,
        lambda: network(2, 48, 48, 48, 1, act=nn.Tanh),
        places,
        grid,
        residual,
        error,
        steps=400,
        batch=64,
    ),
    "GPT, 3 million": Task(
        PART,
        lambda: nets.GPT(256, 4, TOKENS, LENGTH),
        texts,
        lambda: held_out(plain),
        next_character,
        steps=30,
        batch=16,
    ),
}
