"""Directions that a rank makes of what it holds of gradients, alone or with others."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from singd.capture.weight_matrix import WeightMatrix
from singd.placement.assignment import Assignment
from singd.placement.base import Made, Work
from singd.placement.columns import direction_rows
from singd.placement.holding import Slot
from singd.placement.splits import Split, gathered


class OwnDirections:
    """Directions by rows, by columns and of shards, a part of :class:`Sharded`."""

    _assigned: Assignment
    holding: Callable[[Sequence[WeightMatrix]], Any]
    make_holding: Callable[[Sequence[WeightMatrix]], Any]

    def _held_gradient(self, matrix: WeightMatrix, p: Tensor) -> Tensor:
        """What this rank holds of a gradient; zero where there is none."""
        slots = self.holding([matrix]).slots[0]
        slot = next(slot for slot in slots if slot.parameter is p)
        return torch.zeros_like(slot.of(p)) if p.grad is None else slot.of(p.grad)

    def _of_columns(self, works: Sequence[Work]) -> Iterator[Made]:
        """What this rank holds of directions whose halves ranks make by turns."""
        if not works:
            return
        rows = [torch.stack([self._rows(matrix) for matrix in work.matrices]) for work in works]
        splits = [self._split(work.matrices[0]) for work in works]
        for work, own, made in zip(works, rows, direction_rows(works, rows, splits), strict=True):
            yield self._made(work, own, made)

    def _of_shards(self, works: Sequence[Work]) -> Iterator[Made]:
        """What this rank holds of directions of shards, of rows that are gathered if they must."""
        rows = [torch.stack([self._rows(matrix) for matrix in work.matrices]) for work in works]
        rests = [self._assigned.shards[work.matrices[0]].rest for work in works]
        split = [(i, rest) for i, rest in enumerate(rests) if rest is not None]
        G = dict(enumerate(rows))
        if split:
            by_rows = [replace(rest, dim=1) for _, rest in split]  # of [matrices, rows, columns]
            found = gathered([rows[i] for i, _ in split], by_rows)
            G |= zip([i for i, _ in split], found, strict=True)
        for i, (work, own, rest) in enumerate(zip(works, rows, rests, strict=True)):
            made = work.apply(G.pop(i))
            side = slice(None) if rest is None else rest.side(dist.get_rank(rest.group))
            yield self._made(work, own, made[:, side])

    def _of_rows(self, work: Work) -> Made:
        """What this rank holds of directions that it makes of its rows alone."""
        rows = torch.stack([self._rows(matrix) for matrix in work.matrices])
        split = self._split(work.matrices[0])
        if work.matrices[0] in self._assigned.parts:
            made = work.apply(rows)
        else:
            side = split.side(dist.get_rank(split.group))
            made = work.apply_rows(rows, rows=side).to(rows.dtype)
        return self._made(work, rows, made)

    def _split(self, matrix: WeightMatrix) -> Split:
        split = self._assigned.split(matrix.weight)
        if split is None:
            raise RuntimeError(f"{matrix.name} has lost its rows")
        return split

    def _made(self, work: Work, rows: Tensor, made: Tensor) -> Made:
        """What is held of the rows of gradients and directions, with the bias as last column."""
        d_in = rows.shape[-1]
        own: dict[WeightMatrix, tuple[Tensor, Tensor]] = dict(
            zip(work.matrices, zip(rows, made, strict=True), strict=True)
        )
        holding = self.make_holding(work.matrices)

        def part(slot: Slot, which: int) -> Tensor:
            t = own[slot.matrix][which]
            is_bias = slot.parameter is slot.matrix.bias
            return t[:, -1] if is_bias else t[:, : d_in - (slot.matrix.bias is not None)]

        gradient, direction = (
            holding.joined(functools.partial(part, which=which)) for which in (0, 1)
        )
        return Made(work.matrices, holding, gradient, direction)

    def _rows(self, matrix: WeightMatrix) -> Tensor:
        """This rank's rows of a gradient, with those of the bias as the last column."""
        parts = [self._held_gradient(matrix, p) for p in matrix.parameters]
        return torch.cat([parts[0].flatten(1), *(bias[:, None] for bias in parts[1:])], dim=1)
