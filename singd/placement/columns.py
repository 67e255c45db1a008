"""Directions whose halves are made by all ranks together, by rows and then by columns."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from singd.capture.weight_matrix import WeightMatrix
from singd.layers import Layer
from singd.placement.base import Work
from singd.placement.exchange import all_to_all
from singd.placement.splits import Split, ends_of


def has_rows(matrix: WeightMatrix, splits: list[Split | None]) -> bool:
    """Whether what a rank holds of a matrix are rows of it.

    Args:
        matrix: Matrix.
        splits: How its parameters are split.
    """
    layer = type(matrix.layer)
    is_plain = (layer.to_matrix, layer.from_matrix) == (Layer.to_matrix, Layer.from_matrix)
    is_whole = matrix.rows is None and len(matrix.shape) == 2
    by_rows = all(split is not None and split.dim == 0 for split in splits)
    return is_plain and is_whole and by_rows and matrix.weight.shape[0] == matrix.shape[0]


def direction_rows(work: Work, rows: Tensor, split: Split) -> Tensor:
    """The rows of directions, ``[matrices, rows, d_in]``, by two exchanges.

    Args:
        work: Equal matrices, and the halves of their directions.
        rows: This rank's rows of their gradients.
        split: How their rows are split.
    """
    me, ranks = dist.get_rank(split.group), range(dist.get_world_size(split.group))
    count, _, d_in = rows.shape
    ends = (0, *ends_of(d_in, len(ranks)))
    columns = [slice(ends[rank], ends[rank + 1]) for rank in ranks]
    sides = [split.side(rank) for rank in ranks]

    def shape(rank_of_rows: int, rank_of_columns: int) -> torch.Size:
        height = sides[rank_of_rows].stop - sides[rank_of_rows].start
        width = columns[rank_of_columns].stop - columns[rank_of_columns].start
        return torch.Size([count, height, width])

    Y = work.apply_input(rows)
    parts = [[Y[..., side]] for side in columns]
    received = all_to_all(parts, [[shape(rank, me)] for rank in ranks], Y, split.group)
    Z = work.apply_grad(torch.cat([own[0] for own in received], dim=1))
    parts = [[Z[:, side]] for side in sides]
    received = all_to_all(parts, [[shape(me, rank)] for rank in ranks], Z, split.group)
    return torch.cat([own[0] for own in received], dim=2).to(rows.dtype)
