"""What a rank holds of equal matrices, and of their parameters."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from singd.capture.weight_matrix import WeightMatrix
from singd.ops.reductions import leading
from singd.ops.stochastic_rounding import WHOLE

Kept = list[Tensor]
"""What is kept of equal matrices: see :class:`Holding`."""


@dataclass(eq=False)
class Slot:
    """The numbers of one parameter of a matrix that this rank holds: here all of them."""

    matrix: WeightMatrix
    parameter: nn.Parameter
    indices = WHOLE
    """The places of these numbers in the parameter's part of the matrix."""

    @functools.cached_property
    def count(self) -> int:
        """How many numbers of the parameter belong to the matrix, on all ranks."""
        return self.matrix.part_shape(self.parameter).numel()

    def of(self, t: Tensor) -> Tensor:
        """These numbers of the parameter, or of what is stored like it, a view."""
        return self.matrix.part(t.detach())


class Holding:
    """What this rank holds of equal matrices: here all of them, side by side.

    It is kept in one tensor ``[matrices, ..., d_out, d_in]``, whose last columns are the biases, or
    in two, of which the second has these.

    Attributes:
        matrices: Equal matrices.
        slots: Of every matrix those of its :attr:`~WeightMatrix.parameters`.
    """

    slots: Sequence[Sequence[Slot]]

    def __init__(self, matrices: Sequence[WeightMatrix]) -> None:
        self.matrices = list(matrices)
        self.slots = [[Slot(m, p) for p in m.parameters] for m in self.matrices]

    def keep(self, whole: Kept) -> Kept:
        """What is held of ``[matrices, ..., d_out, columns]``; may share its memory."""
        return whole

    def parts(self, kept: Kept) -> list[list[Tensor]]:
        """What was kept as views, one for each slot and shaped like it."""
        rows = zip(self.matrices, *(t.unbind() for t in kept), strict=True)
        if len(kept) == 1:
            return [matrix.split(t) for matrix, t in rows]
        return [matrix.shaped(weight, bias) for matrix, weight, bias in rows]

    def counted(self, kept: Kept) -> Kept:
        """What this rank counts in sums over all ranks: every number is counted by one of them."""
        return kept

    def is_counted(self, slot: Slot) -> bool:
        """Whether this rank counts the numbers of a slot."""
        return True

    def counts(self) -> list[int]:
        """How many numbers of each matrix there are in parameters with a gradient, on all ranks."""
        return [
            sum(slot.count for slot in slots if slot.parameter.grad is not None)
            for slots in self.slots
        ]

    def norms(self, kept: Kept) -> Tensor:
        """The norms of matrices, ``[matrices]``, of what this rank counts, in float32 at least.

        Parameters without a gradient do not count.
        """
        if any(slot.parameter.grad is None for slots in self.slots for slot in slots):
            return self.norms_of(self.parts(kept))
        wide = torch.promote_types(kept[0].dtype, torch.float32)
        found = [torch.linalg.vector_norm(t.flatten(1), dim=1, dtype=wide) for t in kept]
        return found[0] if len(found) == 1 else torch.hypot(*found)

    def norms_of(self, parts: Sequence[Sequence[Tensor]]) -> Tensor:
        """:meth:`norms` of tensors shaped like the slots."""
        tensors = [
            t if slot.parameter.grad is not None and self.is_counted(slot) else t.new_zeros(1)
            for slots, both in zip(self.slots, parts, strict=True)
            for slot, t in zip(slots, both, strict=True)
        ]
        wide = torch.promote_types(tensors[0].dtype, torch.float32)
        norms = torch.stack(torch._foreach_norm(tensors, 2, wide))
        return torch.linalg.vector_norm(norms.view(len(self.matrices), -1), dim=1)

    def scale_(self, kept: Kept, scale: Tensor) -> None:
        """Multiply what is held of every matrix by a number.

        Args:
            kept: What :meth:`keep` gave, changed in place.
            scale: A number for each matrix, ``[matrices]``; it may be in a wider data type.
        """
        for t in kept:
            t.mul_(leading(scale, t))

    def scaled(self, kept: Kept, scale: Tensor) -> list[list[Tensor]]:
        """:meth:`parts` of what :meth:`scale_` makes; ``kept`` is given up.

        On a CPU a step reads every part as one piece of memory, and so it is written here.
        """
        if len(kept) == 1 and self.matrices[0].bias is not None and kept[0].is_cpu:
            by = leading(scale, kept[0])
            both = (kept[0][..., :-1] * by, kept[0][..., -1:] * by)
            return self.parts([t.to(kept[0].dtype) for t in both])
        self.scale_(kept, scale)
        return self.parts(kept)
