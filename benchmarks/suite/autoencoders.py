"""Autoencoders of digits: losses that are sums over pixels, means, and a bound on a likelihood."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.suite.sampling import intensities, rows
from benchmarks.suite.task import Batch, Task

LATENT = 8


def network(*widths: int, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with an activation between them."""
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out), act()]
    return nn.Sequential(*layers[:-1])


def summed_bce(model: nn.Module, batch: Batch) -> Tensor:
    """Binary cross-entropy in nats, summed over pixels, mean over images."""
    (x,) = batch
    return F.binary_cross_entropy_with_logits(model(x), x, reduction="sum") / len(x)


def mean_squares(model: nn.Module, batch: Batch) -> Tensor:
    """Squared error, mean over pixels and images."""
    (x,) = batch
    return F.mse_loss(model(x), x)


class VAE(nn.Module):
    """A Gaussian code, given with the noise that is drawn for it (Kingma and Welling, 2014)."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = network(196, 128, 2 * LATENT), network(LATENT, 128, 196)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encode(x).chunk(2, 1)
        return self.decode(mean + noise * (0.5 * log_variance).exp()), mean, log_variance


def negative_elbo(model: nn.Module, batch: Batch) -> Tensor:
    """The bound on the negative log-likelihood, in nats of an image."""
    x, noise = batch
    logits, mean, log_variance = model(x, noise)
    divergence = 0.5 * (log_variance.exp() + mean.square() - 1 - log_variance).sum()
    return (F.binary_cross_entropy_with_logits(logits, x, reduction="sum") + divergence) / len(x)


def images(seed: int, size: int) -> Iterator[Batch]:
    return rows(seed, size, intensities()[0])


def images_test() -> list[Batch]:
    return [(x,) for x in intensities()[1].split(250)]


def images_and_noise(seed: int, size: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed + 1)
    for (x,) in images(seed, size):
        yield x, torch.randn(len(x), LATENT, generator=generator)


@cache
def images_and_noise_test() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [(x, torch.randn(len(x), LATENT, generator=generator)) for (x,) in images_test()]


of_images = partial(Task, batches=images, held_out=images_test, steps=300, batch=64)

TASKS: dict[str, Task] = {
    "deep autoencoder, summed BCE": of_images(
        "development", lambda: network(196, 128, 64, 32, 12, 32, 64, 128, 196), loss=summed_bce
    ),
    "autoencoder, mean MSE": of_images(
        "held out", lambda: network(196, 128, 16, 128, 196), loss=mean_squares
    ),
    "VAE": Task(
        "held out",
        VAE,
        images_and_noise,
        images_and_noise_test,
        negative_elbo,
        steps=300,
        batch=64,
    ),
}
