"""The parts of matrices that a rank holds of a sharded model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from singd.capture.weight_matrix import WeightMatrix
from singd.ops.dtensor import is_distributed, local
from singd.ops.reference import Indices
from singd.placement.holding import Holding, Kept, Slot


class LocalSlot(Slot):
    """The numbers of one parameter of a matrix that this rank holds: a box.

    Attributes:
        within: The box in this rank's part of the parameter.
        box: The box in the whole parameter of the matrix.
    """

    within: tuple[slice, ...]
    box: tuple[slice, ...]

    def __init__(self, matrix: WeightMatrix, parameter: nn.Parameter) -> None:
        super().__init__(matrix, parameter)
        shape, offset = _local_box(parameter)
        within = [slice(0, n) for n in shape]
        box = [slice(o, o + n) for o, n in zip(offset, shape, strict=True)]
        if matrix.rows is not None:
            first, end, _ = matrix.rows.indices(parameter.shape[0])
            low = min(max(first, offset[0]), end)
            high = max(low, min(end, offset[0] + shape[0]))
            within[0] = slice(low - offset[0], high - offset[0]) if high > low else slice(0, 0)
            box[0] = slice(low - first, high - first)
        self.within, self.box = tuple(within), tuple(box)
        self.indices = _indices(matrix.part_shape(parameter), box)

    @property
    def shape(self) -> torch.Size:
        """The shape of the box."""
        return torch.Size([side.stop - side.start for side in self.box])

    def of(self, t: Tensor) -> Tensor:
        """These numbers of the parameter, or of what is stored like it, a view."""
        return local(t).detach()[self.within]


def _indices(shape: torch.Size, box: Sequence[slice]) -> Indices:
    """The places of the numbers of a box, cut along the first dimension and one other at most."""
    strides = [shape[d + 1 :].numel() for d in range(len(shape))]
    start = sum(side.start * stride for side, stride in zip(box, strides, strict=True))
    for side, n, stride in list(zip(box, shape, strides, strict=True))[:0:-1]:
        if 0 < side.stop - side.start < n:
            return Indices(start, (side.stop - side.start) * stride, n * stride)
    return Indices(start)


def _local_box(p: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of this rank's part of a parameter, and where it begins."""
    if not is_distributed(p):
        return tuple(p.shape), (0,) * p.ndim
    held: Any = p
    shape, offset = compute_local_shape_and_global_offset(
        p.shape, held.device_mesh, held.placements
    )
    if 0 in shape:
        offset = (0,) * p.ndim
    return tuple(shape), tuple(offset)


class LocalHolding(Holding):
    """The parts of equal matrices that this rank holds, one after the other in a vector.

    Those come first which the rank counts.

    Args:
        matrices: Equal matrices.
        groups: Process groups of all ranks, one for each dimension of their mesh.
    """

    slots: Sequence[Sequence[LocalSlot]]

    def __init__(self, matrices: Sequence[WeightMatrix], groups: Sequence[Any]) -> None:
        self.matrices = list(matrices)
        self.slots = [[LocalSlot(m, p) for p in m.parameters] for m in self.matrices]
        every = [slot for slots in self.slots for slot in slots]
        self._is_counted: dict[Slot, bool] = {s: is_first_copy(s.parameter, groups) for s in every}
        self._order = sorted(every, key=lambda slot: not self._is_counted[slot])
        self._sizes = [slot.shape.numel() for slot in self._order]
        self._counts = sum(s.shape.numel() for s in every if self._is_counted[s])

    def keep(self, whole: Kept) -> Kept:
        """What is held of ``[matrices, ..., d_out, d_in]``, a vector."""
        (joined,) = whole
        split = [m.split(t) for m, t in zip(self.matrices, joined.unbind(), strict=True)]
        parts = {
            slot: part[slot.box]
            for slots, parts in zip(self.slots, split, strict=True)
            for slot, part in zip(slots, parts, strict=True)
        }
        return self.joined(lambda slot: parts[slot])

    def joined(self, part: Callable[[LocalSlot], Tensor]) -> Kept:
        """The vector of the parts of all slots."""
        return [torch.cat([part(slot).flatten() for slot in self._order])]

    def parts(self, kept: Kept) -> list[list[Tensor]]:
        """What was kept as views, one for each slot and shaped like it."""
        pieces = zip(self._order, kept[0].split(self._sizes), strict=True)
        found = {slot: t.view(slot.shape) for slot, t in pieces}
        return [[found[slot] for slot in slots] for slots in self.slots]

    def counted(self, kept: Kept) -> Kept:
        """What this rank counts: every number is counted by one rank."""
        return [kept[0][: self._counts]]

    def is_counted(self, slot: Slot) -> bool:
        """Whether this rank counts the numbers of a slot."""
        return self._is_counted[slot]

    def norms(self, kept: Kept) -> Tensor:
        """The norms of matrices, of what this rank counts of those parameters with a gradient."""
        return self.norms_of(self.parts(kept))

    def scale_(self, kept: Kept, scale: Tensor) -> None:
        """Multiply what is held of every matrix by a number."""
        self.scaled(kept, scale)

    def scaled(self, kept: Kept, scale: Tensor) -> list[list[Tensor]]:
        """The parts, of which each is one piece of memory, after :meth:`scale_`."""
        found = self.parts(kept)
        for parts, number in zip(found, scale, strict=True):
            torch._foreach_mul_(parts, number)
        return found


def is_first_copy(p: Tensor, groups: Sequence[Any]) -> bool:
    """Whether this rank is the first of those that hold the same numbers of a parameter."""
    split = {name for name, placement in group_places(p).items() if not placement.is_replicate()}
    return all(group.group_name in split or dist.get_rank(group) == 0 for group in groups)


def group_places(p: Any) -> dict[str, Any]:
    """How a parameter is placed over each process group of its mesh, by the group's name."""
    if not is_distributed(p):
        return {}
    return {
        p.device_mesh.get_group(i).group_name: placement for i, placement in enumerate(p.placements)
    }
