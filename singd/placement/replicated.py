"""One process, and data parallelism: every rank holds everything, and ranks share the samples.

Statistics are sums with counts, so ranks only have to add them up.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel as TorchDataParallel
from torch.nn.parallel import DistributedDataParallel

from singd.capture.statistics import KroneckerStatistics
from singd.placement.base import Placement, Statistics


class OneProcess(Placement):
    """There is one rank."""

    def agree(self, numbers: Sequence[float | Tensor], like: Tensor) -> list[float]:
        """The numbers themselves."""
        return [float(number) for number in numbers]

    def reduce(self, statistics: Statistics) -> Statistics:
        """The statistics themselves."""
        return statistics

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Gradients are whole."""

    def complete(self, sums: Tensor) -> Tensor:
        """The sums themselves."""
        return sums


class DataParallel(Placement):
    """Every rank holds the whole model and sees some of the samples.

    Args:
        group: Process group of the ranks; all ranks if ``None``.
        averages_gradients: Whether gradients are still to be averaged, as they are not in a model
            wrapped in :class:`~torch.nn.parallel.DistributedDataParallel`.
    """

    def __init__(self, group: Any, averages_gradients: bool) -> None:
        self.group, self.averages_gradients = group, averages_gradients
        self.size = dist.get_world_size(group)

    def agree(self, numbers: Sequence[float | Tensor], like: Tensor) -> list[float]:
        """The sums over all ranks, in one reduction."""
        device = like.device
        sums = torch.stack(
            [torch.as_tensor(n, dtype=torch.float64, device=device) for n in numbers]
        )
        dist.all_reduce(sums, group=self.group)
        return [float(n) for n in sums.tolist()]

    def reduce(self, statistics: Statistics) -> Statistics:
        """The sums over all ranks, matrix by matrix."""
        return {matrix: self._reduced(one) for matrix, one in statistics.items()}

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Average gradients over the ranks; a parameter that some rank used has one on all."""
        for p in parameters if self.averages_gradients else ():
            if p.grad is not None:
                dist.all_reduce(p.grad, group=self.group)
                p.grad.div_(self.size)

    def complete(self, sums: Tensor) -> Tensor:
        """The sums themselves: every rank holds everything."""
        return sums

    def _reduced(self, one: KroneckerStatistics) -> KroneckerStatistics:
        inputs = one.input.tensors()
        tensors = [*inputs, *one.grad.tensors()]
        counts = [one.rows, one.samples, one.loss_terms]
        numbers = torch.tensor(counts, dtype=torch.float64, device=tensors[0].device)
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat, group=self.group)
        dist.all_reduce(numbers, group=self.group)
        pieces = flat.split([t.numel() for t in tensors])
        parts = [piece.view_as(t) for piece, t in zip(pieces, tensors, strict=True)]
        rows, samples, loss_terms = (int(n) for n in numbers.tolist())
        return replace(
            one,
            input=one.input.with_tensors(parts[: len(inputs)]),
            grad=one.grad.with_tensors(parts[len(inputs) :]),
            rows=rows,
            samples=samples,
            loss_terms=loss_terms,
        )


def find_placement(group: Any, *, is_reduced: bool) -> Placement:
    """The placement of a model that is whole on every rank.

    Args:
        group: Process group of the ranks that share the data; all ranks if ``None``.
        is_reduced: Whether gradients are averaged in the backward pass.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
        return DataParallel(group, averages_gradients=not is_reduced)
    return OneProcess()


def unwrapped(model: Any) -> tuple[Any, bool]:
    """The model inside wrappers of PyTorch, and whether one of them averages gradients."""
    is_reduced = False
    while True:
        if isinstance(model, TorchDataParallel | DistributedDataParallel):
            model, is_reduced = model.module, True
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # by torch.compile
            model = model._orig_mod
        else:
            return model, is_reduced


def refuse_sharded(model: nn.Module) -> None:
    """Raise ``ValueError`` if a rank holds only a part of some parameter."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    flat = fsdp is not None and any(
        isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules()
    )
    for name, p in model.named_parameters():
        if flat or hasattr(p, "device_mesh"):
            raise ValueError(
                f"{name}: expected a whole parameter on every rank, got one that is sharded (by "
                "FSDP or tensor parallelism): use DistributedDataParallel"
            )
