"""The same training script for ranks that share every batch, and for one process that has it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from tests.sharded.layouts import Layout
from tests.singd.runs import F64, batches

STEPS, ROWS = 4, 14
OPTIONS: dict[str, Any] = {
    "lr": 0.05,
    "momentum": 0.9,
    "damping": 1e-3,
    "weight_decay": 0.01,
    "T": 2,
    "lr_cov": 0.3,
    "alpha1": 0.5,
    "loss_average": "batch",
    "structures": ("dense", "hierarchical(1, 1)"),
    "kl_clip": 1e-2,
    "factor_clip": 0.5,
    "graft": None,
    "seed": 0,
}


class Block(nn.Module):
    """Two layers with a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.norm(self.inner(x)).tanh())


def net(seed: int = 0) -> nn.Sequential:
    """Always the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), Block(), Block(), nn.Linear(6, 3)).to(F64)


class Setting:
    """Who trains: a rank, or one process in place of all ranks.

    Args:
        layout: Layout of this rank; ``None`` for one process.
        ranks: Number of ranks that share the data.
    """

    def __init__(self, layout: Layout | None, ranks: int) -> None:
        self.layout, self.ranks = layout, ranks

    @property
    def is_first(self) -> bool:
        """Whether this is the first rank."""
        return self.layout is None or self.layout.rank == 0

    def shard(self, model: nn.Module, **options: Any) -> nn.Module:
        return model if self.layout is None else self.layout.shard(model, **options)

    def shard_low(self, model: nn.Module, policy: Any) -> nn.Module:
        """Shard a model with mixed precision; one process does so over a mesh of one rank."""
        layout = self.layout or Layout(init_device_mesh("cpu", (1,)))
        return layout.shard(model, mp_policy=policy)

    def synchronise(self, model: Any, on: bool) -> None:
        """Whether gradients of the passes to come are reduced."""
        if self.layout is not None:
            model.set_requires_gradient_sync(on)

    def shares(self, total: int = ROWS, *, empty: bool = False) -> list[slice]:
        """The samples of this rank, or of all ranks one after the other.

        Args:
            total: Number of samples.
            empty: Leave none for the last rank; otherwise shares are uneven.
        """
        parts = self.ranks - 1 if empty else self.ranks
        cuts = [0, *(total * (i + 1) // parts - i % 2 for i in range(parts - 1)), total]
        if empty:
            cuts.append(total)
        own = [slice(a, b) for a, b in pairwise(cuts)]
        return own if self.layout is None else [own[self.layout.rank]]

    def loss(self, output: Tensor, y: Tensor, total: int = ROWS) -> Tensor:
        """A part of a mean over all samples: ranks average gradients, one process adds them."""
        weight = 1 if self.layout is None else self.ranks
        return weight * 0.5 * (output - y).square().sum() / total

    def backward(self, model: nn.Module, X: Tensor, y: Tensor, **shares: Any) -> None:
        """The gradient of a mean over a batch."""
        for share in self.shares(len(X), **shares):
            self.loss(model(X[share]), y[share], len(X)).backward()


def data() -> list[tuple[Tensor, Tensor]]:
    """Batches."""
    return batches(STEPS, ROWS, 4)
