"""Directions that a rank makes of what it holds of gradients, alone or with others."""

from __future__ import annotations

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
from singd.placement.holding import Kept, Slot
from singd.placement.splits import gathered


class OwnDirections:
    """Directions by rows, by columns and of shards, a part of :class:`Sharded`."""

    _assigned: Assignment
    holding: Callable[[Sequence[WeightMatrix]], Any]
    make_holding: Callable[[Sequence[WeightMatrix]], Any]

    def _held_gradient(self, matrix: WeightMatrix, p: Tensor) -> Tensor:
        """What this rank holds of the gradient of a parameter of a matrix."""
        slots = self.holding([matrix]).slots[0]
        return gradient_of(next(slot for slot in slots if slot.parameter is p))

    def _of_columns(self, works: Sequence[Work]) -> Iterator[Made]:
        """What this rank holds of directions whose halves ranks make by turns."""
        if not works:
            return
        rows = [self._rows(work) for work in works]
        splits = [self._assigned.splits[work.matrices[0].weight] for work in works]
        for work, own, made in zip(works, rows, direction_rows(works, rows, splits), strict=True):
            yield self._made(work, own, made)

    def _of_shards(self, works: Sequence[Work]) -> Iterator[Made]:
        """What this rank holds of directions of shards, of rows that are gathered if they must."""
        rows = [self._rows(work) for work in works]
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
        rows = self._rows(work)
        split = self._assigned.splits[work.matrices[0].weight]
        if work.matrices[0] in self._assigned.parts:
            made = work.apply(rows)
        else:
            side = split.side(dist.get_rank(split.group))
            made = work.apply_rows(rows, rows=side).to(rows.dtype)
        return self._made(work, rows, made)

    def _made(self, work: Work, rows: Tensor, made: Tensor) -> Made:
        """What is held of the rows of gradients and directions, with the bias as last column."""
        holding = self.make_holding(work.matrices)

        def joined(values: Tensor) -> Kept:
            of = dict(zip(work.matrices, values, strict=True))
            return holding.joined(lambda slot: _columns(of[slot.matrix], slot))

        return Made(work.matrices, holding, joined(rows), joined(made))

    def _rows(self, work: Work) -> Tensor:
        """This rank's rows of gradients, with those of biases as the last column."""
        found = []
        for matrix in work.matrices:
            weight, *bias = map(gradient_of, self.holding([matrix]).slots[0])
            found.append(torch.cat([weight.flatten(1), *(t[:, None] for t in bias)], dim=1))
        return torch.stack(found)


def gradient_of(slot: Slot) -> Tensor:
    """What this rank holds of a gradient; zero where there is none."""
    p = slot.parameter
    return torch.zeros_like(slot.of(p)) if p.grad is None else slot.of(p.grad)


def _columns(rows: Tensor, slot: Slot) -> Tensor:
    """The columns of a slot in rows of a matrix, whose last one is of the bias."""
    if slot.parameter is slot.matrix.bias:
        return rows[:, -1]
    return rows if slot.matrix.bias is None else rows[:, :-1]
