"""Where batches come from: rows of tensors in random order, and windows of a text."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from benchmarks.data import load
from benchmarks.suite.task import Batch
from benchmarks.text import python_topics

LENGTH = 48  # characters in a window


def rows(seed: int, size: int, *data: Tensor) -> Iterator[Batch]:
    """Batches of rows, each drawn without replacement."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randperm(len(data[0]), generator=generator)[:size]
        yield tuple(t[chosen] for t in data)


def windows(seed: int, size: int, length: int = LENGTH) -> Iterator[Tensor]:
    """Pieces ``[size, length]`` of the training text, from random places."""
    generator, text = torch.Generator().manual_seed(seed), python_topics().train
    while True:
        starts = torch.randint(len(text) - length, (size, 1), generator=generator)
        yield text[starts + torch.arange(length)]


@cache
def held_out_windows(length: int = LENGTH, size: int = 64, batches: int = 4) -> list[Tensor]:
    """Pieces of the test text, evenly spaced."""
    text, count = python_topics().held_out["test"], size * batches
    starts = torch.linspace(0, len(text) - length - 1, count).long()[:, None]
    return list(text[starts + torch.arange(length)].split(size))


@cache
def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """MNIST digits at half their resolution, ``[N, 1, 14, 14]``, with labels: train and test."""
    train, test = (
        (torch.nn.functional.avg_pool2d(part.images, 2), part.labels) for part in load("demo")
    )
    return train, test


@cache
def intensities() -> tuple[Tensor, Tensor]:
    """The same digits as vectors ``[N, 196]`` of numbers in [0, 1]: train and test."""
    (train, _), (test, _) = digits()
    return tuple((x.flatten(1) * 0.3081 + 0.1307).clamp(0, 1) for x in (train, test))
