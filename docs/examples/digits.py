"""
Images of digits
================

Data and a small network, which the pages on trained factors begin with.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LinearLR

from singd import SINGD


def images(train: int = 600) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images ``[N, 64]`` in [0, 1] and labels: ``train`` of them for training, the rest to test."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(pixels, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    return x[:train], y[:train], x[train:], y[train:]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def fit(
    net: nn.Module, x: Tensor, y: Tensor, *, tau: float = 0.0, epochs: int = 40, batch: int = 50
) -> SINGD:
    """Train to the most probable weights under the prior ``N(0, I / tau)``; the optimizer.

    The rate falls linearly to zero. The gradient of the prior is added to that of the loss, so that
    the layers explain what the backward pass leaves.
    """
    optimizer = SINGD(net, lr=3e-3, T=1, structures=("dense", "dense"))
    steps = epochs * -(-len(x) // batch)
    schedule = LinearLR(optimizer, start_factor=1.0, end_factor=0.01, total_iters=steps)
    for _ in range(epochs):
        for i in torch.randperm(len(x)).split(batch):
            optimizer.zero_grad()
            cross_entropy(net(x[i]), y[i]).backward()
            for p in net.parameters():
                p.grad.add_(p.detach(), alpha=tau / len(x))
            optimizer.step()
            schedule.step()
    return optimizer
