"""Directions whose halves are made by all ranks together, by rows and then by columns."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from singd.capture.weight_matrix import WeightMatrix
from singd.ops.grouping import grouped
from singd.placement.base import Work
from singd.placement.exchange import all_to_all
from singd.placement.splits import Split, ends_of


def has_rows(matrix: WeightMatrix, splits: list[Split | None]) -> bool:
    """Whether what a rank holds of a matrix, whose parameters are split so, are rows of it."""
    is_whole = matrix.rows is None and len(matrix.shape) == 2
    by_rows = all(split is not None and split.dim == 0 for split in splits)
    is_same = is_whole and matrix.is_reshaped and matrix.weight.shape[0] == matrix.shape[0]
    return by_rows and is_same


def direction_rows(
    works: Sequence[Work], rows: Sequence[Tensor], splits: Sequence[Split]
) -> list[Tensor]:
    """The rows of directions, ``[matrices, rows, d_in]`` of each work, by two exchanges for all.

    Args:
        works: Equal matrices, and the halves of their directions.
        rows: This rank's rows of their gradients.
        splits: How their rows are split, all over one process group.
    """
    group = splits[0].group
    me, ranks = dist.get_rank(group), range(dist.get_world_size(group))
    columns = [_sides(ends_of(t.shape[-1], len(ranks))) for t in rows]
    sides = [_sides(split.ends) for split in splits]

    def shape(i: int, rank_of_rows: int, rank_of_columns: int) -> torch.Size:
        height, width = sides[i][rank_of_rows], columns[i][rank_of_columns]
        return torch.Size([len(rows[i]), height.stop - height.start, width.stop - width.start])

    Y = [work.apply_input(t) for work, t in zip(works, rows, strict=True)]
    found = _exchange(
        [[y[..., c[rank]] for y, c in zip(Y, columns, strict=True)] for rank in ranks],
        [[shape(i, rank, me) for i in range(len(Y))] for rank in ranks],
        group,
    )
    Z = [work.apply_grad(torch.cat(parts, dim=1)) for work, parts in zip(works, found, strict=True)]
    found = _exchange(
        [[z[:, s[rank]] for z, s in zip(Z, sides, strict=True)] for rank in ranks],
        [[shape(i, me, rank) for i in range(len(Z))] for rank in ranks],
        group,
    )
    return [torch.cat(parts, dim=2).to(t.dtype) for parts, t in zip(found, rows, strict=True)]


def _sides(ends: Sequence[int]) -> list[slice]:
    return [slice(a, b) for a, b in itertools.pairwise((0, *ends))]


def _exchange(
    sent: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[torch.Size]], group: Any
) -> list[list[Tensor]]:
    """For every work what each rank sent of it, by one collective for each data type.

    Arguments are those of :func:`all_to_all`, with an item for every work.
    """
    found: dict[int, list[Tensor]] = {}
    for some in grouped(range(len(sent[0])), lambda i: sent[0][i].dtype):
        received = all_to_all(
            [[own[i] for i in some] for own in sent],
            [[own[i] for i in some] for own in shapes],
            sent[0][some[0]],
            group,
        )
        found |= zip(some, map(list, zip(*received, strict=True)), strict=True)
    return [found[i] for i in range(len(sent[0]))]
