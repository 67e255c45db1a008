"""Images: digits at half their resolution, and pieces of two photographs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial

import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.suite.sampling import digits, rows
from benchmarks.suite.task import Batch, Task
from benchmarks.suite.vision_nets import (
    CompactTransformer,
    ConvNeXt,
    Mixer,
    ResNet,
    UNet,
    contrastive_cnn,
)


def classes(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the labels."""
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def labelled(seed: int, size: int) -> Iterator[Batch]:
    return rows(seed, size, *digits()[0])


def labelled_test() -> list[Batch]:
    return list(zip(*(t.split(250) for t in digits()[1]), strict=True))


# Contrast ----------------------------------------------------------------------------------------


def contrast(model: nn.Module, batch: Batch, temperature: float = 0.2) -> Tensor:
    """Cross-entropy of finding the other view of every image (Chen et al., SimCLR, 2020)."""
    views = F.normalize(model(torch.cat(batch)), dim=1)
    similar = (views @ views.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(similar, torch.arange(len(views)).roll(len(views) // 2))


def two_views(images: Tensor, generator: torch.Generator) -> Batch:
    """Every image twice: moved by up to two pixels, and noisy."""
    padded = F.pad(images[:, 0], (2, 2, 2, 2), value=float(images.min()))

    def view() -> Tensor:
        shifts = torch.randint(5, (2, len(images), 1), generator=generator)
        y, x = shifts + torch.arange(14)
        moved = padded[torch.arange(len(images))[:, None, None], y[:, :, None], x[:, None, :]]
        return (moved + 0.3 * torch.randn(moved.shape, generator=generator))[:, None]

    return view(), view()


def pairs(seed: int, size: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed + 1)
    return (two_views(images, generator) for images, _ in labelled(seed, size))


@cache
def pairs_test() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [two_views(images, generator) for images in digits()[1][0].split(50)]


# Photographs -------------------------------------------------------------------------------------


@cache
def photographs() -> tuple[Tensor, Tensor]:
    """Pieces ``[N, 3, 16, 16]`` of scikit-learn's two photographs, left of two thirds and right."""
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for photograph in load_sample_images().images:
        image = F.avg_pool2d(torch.tensor(photograph).permute(2, 0, 1) / 255.0 - 0.5, 2)
        for side, part in zip(sides, image.tensor_split([208], dim=2), strict=True):
            side.append(part.unfold(1, 16, 8).unfold(2, 16, 8).permute(1, 2, 0, 3, 4).flatten(0, 1))
    return torch.cat(sides[0]), torch.cat(sides[1])


def noise(model: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error of a noisy image's restoration."""
    images, added = batch
    return F.mse_loss(model(images + added), images)


def noisy(seed: int, size: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed + 1)
    for (images,) in rows(seed, size, photographs()[0]):
        yield images, 0.2 * torch.randn(images.shape, generator=generator)


@cache
def noisy_test() -> list[Batch]:
    generator, images = torch.Generator().manual_seed(0), photographs()[1]
    added = 0.2 * torch.randn(images.shape, generator=generator)
    return list(zip(images.split(128), added.split(128), strict=True))


digit_task = partial(Task, batches=labelled, held_out=labelled_test, loss=classes, steps=150)

TASKS: dict[str, Task] = {
    "contrastive CNN": Task(
        "development", contrastive_cnn, pairs, pairs_test, contrast, steps=150, batch=48
    ),
    "narrow ResNet": digit_task("development", lambda: ResNet(8)),
    "MLP-Mixer": digit_task("development", lambda: Mixer(32, 2)),
    "ConvNeXt": digit_task("held out", lambda: ConvNeXt(24, 2)),
    "compact transformer": digit_task("held out", lambda: CompactTransformer(32, 2)),
    "U-Net": Task("held out", lambda: UNet(12), noisy, noisy_test, noise, steps=150, batch=8),
}
