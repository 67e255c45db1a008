"""How parameters are split over ranks: boxes of numbers, and what is gathered of them.

The rank of a process group is the coordinate along one dimension of a mesh. Sizes follow
:class:`torch.distributed.tensor.Shard`: as many rows for each rank as for the first, which has the
most, and fewer or none for the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from singd.ops.dtensor import is_distributed, local
from singd.ops.grouping import grouped


@dataclass(frozen=True)
class Split:
    """A parameter that is split along one dimension, over the ranks of one process group.

    Attributes:
        group: Process group.
        dim: Dimension of the parameter.
        ends: Ends of the parts of the ranks along it.
    """

    group: Any
    dim: int
    ends: tuple[int, ...]

    def side(self, rank: int) -> slice:
        """What a rank holds along :attr:`dim`."""
        return slice(self.ends[rank - 1] if rank else 0, self.ends[rank])

    def shape(self, other: torch.Size, rank: int) -> torch.Size:
        """The shape of a rank's part, from that of the whole or of another part."""
        side = self.side(rank)
        return torch.Size([*other[: self.dim], side.stop - side.start, *other[self.dim + 1 :]])


def split_of(p: Any) -> Split | None:
    """How a parameter is split; ``None`` if it is whole, or split over several dimensions."""
    if not is_distributed(p):
        return None
    split = [i for i, placement in enumerate(p.placements) if not placement.is_replicate()]
    if len(split) != 1 or not p.placements[split[0]].is_shard():
        return None
    mesh, dim = p.device_mesh, p.placements[split[0]].dim
    ranks, size = mesh.size(split[0]), p.shape[dim]
    return Split(mesh.get_group(split[0]), dim, ends_of(size, ranks))


def ends_of(size: int, ranks: int) -> tuple[int, ...]:
    """Where the part of each rank ends, of ``size`` rows."""
    each = -(-size // ranks)
    return tuple(min(size, each * (rank + 1)) for rank in range(ranks))


def gathered(tensors: Sequence[Tensor], splits: Sequence[Split]) -> list[Tensor]:
    """Whole tensors from the parts of all ranks, by one collective for each data type.

    Args:
        tensors: DTensors, or the parts of this rank.
        splits: How each is split, all over one process group.
    """
    group = splits[0].group
    ranks = range(dist.get_world_size(group))
    found: dict[int, Tensor] = {}
    for some in grouped(range(len(tensors)), lambda i: tensors[i].dtype):
        shapes = [[splits[i].shape(tensors[i].shape, rank) for i in some] for rank in ranks]
        longest = max(sum(shape.numel() for shape in own) for own in shapes)
        flat = torch.cat([local(tensors[i]).flatten() for i in some])
        mine = torch.nn.functional.pad(flat, (0, longest - len(flat)))
        received = mine.new_empty(len(ranks), longest)
        dist.all_gather(list(received.unbind()), mine, group=group)
        pieces = []
        for own, row in zip(shapes, received, strict=True):
            counts = [shape.numel() for shape in own]
            cut = row[: sum(counts)].split(counts)
            pieces.append([t.view(shape) for t, shape in zip(cut, own, strict=True)])
        for i, parts in zip(some, zip(*pieces, strict=True), strict=True):
            found[i] = torch.cat(parts, splits[i].dim)
    return [found[i] for i in range(len(tensors))]
