"""The same training script for ranks that share every batch, and for one process that has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

STEPS, ROWS = 4, 14
F64 = torch.float64

Ends = dict[str, Tensor]
"""What training ends with: weights and everything in the optimizer's state, by name."""


@dataclass(frozen=True)
class Layout:
    """How a model is sharded, and which share of the samples this rank has.

    Attributes:
        mesh: Mesh of the ranks that share the data, a
            :class:`~torch.distributed.device_mesh.DeviceMesh`.
        leaves: Whether every child is sharded in a group of its own, or all parameters in one.
    """

    mesh: Any
    leaves: bool = True

    @property
    def ranks(self) -> int:
        """Number of ranks that share the data."""
        return self.mesh.size()

    @property
    def rank(self) -> int:
        """The number of this rank among them."""
        number = 0
        for dim in range(self.mesh.ndim):
            number = number * self.mesh.size(dim) + self.mesh.get_local_rank(dim)
        return number

    def shard(self, model: Any, **options: Any) -> Any:
        """Shard a model in place, and return it."""
        from torch.distributed.fsdp import fully_shard  # takes time to import

        for child in model.children() if self.leaves else ():
            if any(True for _ in child.parameters()):
                fully_shard(child, mesh=self.mesh, **options)
        return fully_shard(model, mesh=self.mesh, **options)


class Setting:
    """Who trains: a rank, or one process in place of all ranks.

    Args:
        layout: Layout of this rank; ``None`` for one process.
        ranks: Number of ranks that share the data.
    """

    def __init__(self, layout: Any, ranks: int) -> None:
        self.layout, self.ranks = layout, ranks

    @property
    def is_first(self) -> bool:
        """Whether this is the first rank."""
        return self.layout is None or self.layout.rank == 0

    def shard(self, model: Any, **options: Any) -> Any:
        """The model, sharded where there are ranks; options of :func:`fully_shard`."""
        return model if self.layout is None else self.layout.shard(model, **options)

    def synchronise(self, model: Any, on: bool) -> None:
        """Whether gradients of the passes to come are reduced."""
        if self.layout is not None:
            model.set_requires_gradient_sync(on)

    def shares(self, total: int = ROWS, *, empty: bool = False) -> list[slice]:
        """The samples of this rank; in one process those of all ranks, one after the other.

        Args:
            total: Number of samples.
            empty: Leave none for the last rank; otherwise shares are uneven.
        """
        parts = self.ranks - 1 if empty else self.ranks
        cuts = [0, *(total * (i + 1) // parts - i % 2 for i in range(parts - 1)), total]
        if empty:
            cuts.append(total)
        shares = [slice(a, b) for a, b in pairwise(cuts)]
        return shares if self.layout is None else [shares[self.layout.rank]]

    def loss(self, output: Tensor, y: Tensor, total: int = ROWS) -> Tensor:
        """A part of a mean over all samples: ranks average gradients, one process adds them."""
        weight = 1 if self.layout is None else self.ranks
        return weight * 0.5 * (output - y).square().sum() / total

    def backward(self, model: nn.Module, X: Tensor, y: Tensor, **shares: Any) -> None:
        """The gradient of a mean over a batch."""
        for share in self.shares(len(X), **shares):
            self.loss(model(X[share]), y[share], len(X)).backward()


class Block(nn.Module):
    """Two layers with a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 6]`` to ``[N, 6]``."""
        return x + self.outer(self.norm(self.inner(x)).tanh())


def net(dtype: torch.dtype = F64) -> nn.Sequential:
    """A net with fewer rows in its weights than a few ranks need; always the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), Block(), Block(), nn.Linear(6, 3)).to(dtype)


def batches(
    count: int = STEPS, dtype: torch.dtype = F64, seed: int = 1
) -> Sequence[tuple[Tensor, Tensor]]:
    """Inputs ``[14, 4]`` and targets ``[14, 3]``."""
    generator = torch.Generator().manual_seed(seed)
    both = [torch.randn(ROWS, 4 + 3, generator=generator, dtype=F64) for _ in range(count)]
    return [(t[:, :4].to(dtype), t[:, 4:].to(dtype)) for t in both]
