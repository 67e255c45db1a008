"""Data parallelism: statistics are sums with counts, so ranks only have to add them up."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from singd.capture import Statistics

if TYPE_CHECKING:
    from singd.base import KroneckerOptimizer


def size(group: Any = None) -> int:
    """Number of processes that share the work; 1 where nothing is set up."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def unwrapped(model: Any) -> tuple[Any, bool]:
    """The model inside wrappers of PyTorch, and whether one of them averages gradients."""
    reduced = False
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model, reduced = model.module, True
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # by torch.compile
            model = model._orig_mod
        else:
            return model, reduced


def refuse_sharded(model: nn.Module) -> None:
    """Raise if a rank holds only a part of some parameter."""
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


def sum_numbers(numbers: Sequence[float | Tensor], device: torch.device, group: Any) -> list[float]:
    """Sum a list of numbers over the ranks, each of which calls this with as many."""
    total = torch.stack([torch.as_tensor(n, dtype=torch.float64, device=device) for n in numbers])
    dist.all_reduce(total, group=group)
    return [float(n) for n in total.tolist()]


def agree(optimizer: KroneckerOptimizer) -> None:
    """Make the ranks do the same: one may lack a gradient, or a reason to use AdamW."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    used = [p.grad is not None for p in params]
    foreign = [unit.explained is False for unit in optimizer._units]
    numbers = [*used, *foreign, optimizer._passes.terms]
    total = sum_numbers(numbers, params[0].device, optimizer._process_group)
    optimizer._passes.end(total.pop())
    for p, count in zip(params, total, strict=False):
        if count and p.grad is None and optimizer._reduce_gradients:
            p.grad = torch.zeros_like(p)
    for unit, count in zip(optimizer._units, total[len(params) :], strict=True):
        if count:
            unit.explained = False


def reduce_statistics(statistics: Iterable[Statistics], group: Any) -> None:
    """Sum statistics over the ranks, each of which calls this with as many, in the same order."""
    for seen in statistics:
        tensors = (*seen.U_K.tensors(), *seen.U_C.tensors())
        counts = [seen.rows, seen.samples, seen.terms]
        numbers = torch.tensor(counts, dtype=torch.float64, device=tensors[0].device)
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat, group=group)
        dist.all_reduce(numbers, group=group)
        pieces = flat.split([t.numel() for t in tensors])
        parts = [piece.view_as(t) for piece, t in zip(pieces, tensors, strict=True)]
        inputs = len(seen.U_K.tensors())
        seen.U_K = seen.U_K.with_tensors(parts[:inputs])
        seen.U_C = seen.U_C.with_tensors(parts[inputs:])
        seen.rows, seen.samples, seen.terms = (int(n) for n in numbers.tolist())


def reduce_gradients(gradients: Iterable[tuple[Tensor, Tensor]], group: Any) -> None:
    """Average gradients over the ranks; does nothing more where that was done already."""
    for _, gradient in gradients:
        dist.all_reduce(gradient, group=group)
        gradient.div_(size(group))
