"""Parts of matrices that are sent to the ranks that work on them, and back, all at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from singd.capture.weight_matrix import WeightMatrix
from singd.placement.splits import Split

Box = tuple[slice, ...]


def all_to_all(
    sent: Sequence[Sequence[Tensor]],
    shapes: Sequence[Sequence[torch.Size]],
    like: Tensor,
    group: Any,
) -> list[list[Tensor]]:
    """What every rank has sent to this one, by one collective.

    Args:
        sent: What goes to each rank.
        shapes: The shapes of what comes from each rank.
        like: A tensor of the data type and device in which numbers travel.
        group: Process group.
    """
    flat = [t.flatten().to(like.dtype) for own in sent for t in own]
    counts = [sum(t.numel() for t in own) for own in sent]
    expected = [sum(shape.numel() for shape in own) for own in shapes]
    received = like.new_empty(sum(expected))
    out = torch.cat(flat) if flat else like.new_empty(0)
    dist.all_to_all_single(received, out, expected, counts, group=group)
    pieces = iter(received.split([shape.numel() for own in shapes for shape in own]))
    return [[next(pieces).view(shape) for shape in own] for own in shapes]


class Exchange:
    """Gradients travel to the owners of matrices, and directions back.

    Args:
        matrices: Matrices with owners, all split over one process group; the same on all ranks.
        owners: The rank that owns each.
        splits: How each of their parameters is split.
    """

    def __init__(
        self,
        matrices: Sequence[WeightMatrix],
        owners: Mapping[WeightMatrix, int],
        splits: Mapping[Tensor, Split],
    ) -> None:
        self.group = splits[matrices[0].weight].group
        me, ranks = dist.get_rank(self.group), range(dist.get_world_size(self.group))
        self.mine = [matrix for matrix in matrices if owners[matrix] == me]
        self._theirs = [
            [
                (m, p, box_of(m, p, splits[p], me))
                for m in matrices
                if owners[m] == rank
                for p in m.parameters
            ]
            for rank in ranks
        ]
        self._ours = [
            [(m, p, box_of(m, p, splits[p], rank)) for m in self.mine for p in m.parameters]
            for rank in ranks
        ]

    def to_owners(
        self, held: Callable[[WeightMatrix, Tensor], Tensor], like: Tensor
    ) -> dict[WeightMatrix, list[Tensor]]:
        """The whole parts of this rank's own matrices.

        Args:
            held: ``held(matrix, p)``, what this rank holds of a part.
            like: A tensor of the data type and device in which numbers travel.
        """
        sent = [[held(m, p) for m, p, _ in own] for own in self._theirs]
        shapes = [[_shape(box) for _, _, box in own] for own in self._ours]
        received = all_to_all(sent, shapes, like, self.group)
        found: dict[WeightMatrix, dict[Tensor, Tensor]] = {
            m: {p: like.new_empty(m.part_shape(p)) for p in m.parameters} for m in self.mine
        }
        for own, pieces in zip(self._ours, received, strict=True):
            for (m, p, box), piece in zip(own, pieces, strict=True):
                found[m][p][box] = piece
        return {m: list(parts.values()) for m, parts in found.items()}

    def from_owners(
        self, whole: Mapping[WeightMatrix, Sequence[Tensor]], like: Tensor
    ) -> dict[tuple[WeightMatrix, Tensor], Tensor]:
        """What this rank holds of the parts of all matrices.

        Args:
            whole: The parts of this rank's own matrices.
            like: A tensor of the data type and device in which numbers travel.
        """
        parts: dict[tuple[WeightMatrix, Tensor], Tensor] = {
            (m, p): t for m in self.mine for p, t in zip(m.parameters, whole[m], strict=True)
        }
        sent = [[parts[m, p][box] for m, p, box in own] for own in self._ours]
        shapes = [[_shape(box) for _, _, box in own] for own in self._theirs]
        received = all_to_all(sent, shapes, like, self.group)
        return {
            (m, p): piece
            for own, pieces in zip(self._theirs, received, strict=True)
            for (m, p, _), piece in zip(own, pieces, strict=True)
        }


def box_of(matrix: WeightMatrix, p: Tensor, split: Split, rank: int) -> Box:
    """What a rank holds of the part of a parameter that is of a matrix."""
    box = [slice(0, n) for n in p.shape]
    box[split.dim] = split.side(rank)
    if matrix.rows is not None:
        first, end, _ = matrix.rows.indices(p.shape[0])
        low = min(max(first, box[0].start), end)
        box[0] = slice(low - first, max(low, min(end, box[0].stop)) - first)
    return tuple(box)


def _shape(box: Box) -> torch.Size:
    return torch.Size([side.stop - side.start for side in box])
