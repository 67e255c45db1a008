"""How factors that one rank has are stored: split by rows, on the mesh of their weight.

So PyTorch's distributed checkpoints load them on any number of ranks, whoever owns them there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from singd.capture.weight_matrix import WeightMatrix
from singd.ops.grouping import grouped
from singd.ops.parts import Part
from singd.placement.exchange import all_to_all
from singd.placement.splits import Split, ends_of, gathered

Item = tuple[WeightMatrix, Tensor, Tensor | None]
"""A matrix, a tensor of the shape of one of its factors', and that of the rank that has it."""


def spread(
    items: Sequence[Item],
    owners: Mapping[WeightMatrix, int],
    parts: Mapping[WeightMatrix, Part],
    group_of: Callable[[WeightMatrix], Any],
) -> list[Tensor]:
    """The tensors of owners, and parts, as DTensors.

    Args:
        items: The same on all ranks, but for what an owner has, and for parts.
        owners: The rank that owns each matrix.
        parts: The rows that this rank has of factors that ranks share.
        group_of: The process group by which a weight is split.
    """
    found: dict[int, Tensor] = {}
    sent: dict[Any, list[tuple[int, int]]] = {}  # by group: the place of an item, and its owner
    for i, (matrix, like, held) in enumerate(items):
        if matrix in parts and like.ndim != 2 and held is not None:
            part, k = parts[matrix], like.shape[-1] if like.ndim > 1 else 1
            rows = _evened(held[: part.own // k], [end // k for end in part.ends], part.group)
            found[i] = _stored(rows, matrix.weight, like.shape, part.group)
        elif matrix in parts:  # the last block, which the rank with the last rows has
            part = parts[matrix]
            sent.setdefault(part.group, []).append((i, part.last))
        else:
            sent.setdefault(group_of(matrix), []).append((i, owners[matrix]))
    for group, some in sent.items():
        own = [items[i] for i, _ in some]
        pieces = _spread(own, [owner for _, owner in some], group)
        found |= zip([i for i, _ in some], pieces, strict=True)
    return [found[i] for i in range(len(items))]


def _evened(held: Tensor, ends: Sequence[int], group: Any) -> Tensor:
    """The rows of a rank as DTensors are split, from those that it has; ends are of all ranks."""
    me, ranks = dist.get_rank(group), dist.get_world_size(group)
    if tuple(ends) == ends_of(ends[-1], ranks):
        return held
    (every,) = gathered([held], [Split(group, 0, tuple(ends))])
    return _rows(every, me, ranks)


def _spread(items: Sequence[Item], owners: Sequence[int], group: Any) -> list[Tensor]:
    """The tensors of owners as DTensors, by one collective for each data type."""
    found: dict[int, Tensor] = {}
    me, ranks = dist.get_rank(group), range(dist.get_world_size(group))
    for chosen in grouped(range(len(items)), lambda i: items[i][1].dtype):
        held = [t for i in chosen if owners[i] == me and (t := items[i][2]) is not None]
        sent = [[_rows(t, rank, len(ranks)) for t in held] for rank in ranks]
        theirs = [[i for i in chosen if owners[i] == rank] for rank in ranks]
        shapes = [[_rows(items[i][1], me, len(ranks)).shape for i in own] for own in theirs]
        like = items[chosen[0]][1].new_empty(0)
        received = all_to_all(sent, shapes, like, group)
        for own, pieces in zip(theirs, received, strict=True):
            found |= zip(own, pieces, strict=True)
    return [
        _stored(found[i], matrix.weight, like.shape, group)
        for i, (matrix, like, _) in enumerate(items)
    ]


def _rows(t: Tensor, rank: int, ranks: int) -> Tensor:
    """The rows that a rank stores; a number is stored by all."""
    if not t.ndim:
        return t
    ends = (0, *ends_of(len(t), ranks))
    return t[ends[rank] : ends[rank + 1]]


def _stored(part: Tensor, weight: Any, shape: torch.Size, group: Any) -> Tensor:
    """A part as a DTensor on the mesh of a weight, with memory of its own; others have copies."""
    part = part.clone()
    if not shape:
        return part
    names = [weight.device_mesh.get_group(i).group_name for i in range(weight.device_mesh.ndim)]
    placements = [Shard(0) if name == group.group_name else Replicate() for name in names]
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part.contiguous(),
        weight.device_mesh,
        placements,
        run_check=False,
        shape=shape,
        stride=strides,
    )
