"""Matrices that tensor parallelism splits, with factors that are split likewise.

A rank has the blocks of its own inputs or output gradients, which are there without being gathered,
and makes the directions of its shard alone. The ranks that share a matrix see the same samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from singd.capture.weight_matrix import WeightMatrix
from singd.ops.dtensor import is_distributed
from singd.ops.parts import Part
from singd.placement.splits import Split, ends_of


@dataclass(frozen=True)
class Shard:
    """The shard of a matrix that is this rank's, or of which it has some rows.

    Attributes:
        part: The blocks of a factor that belong to it.
        rest: How its rows are split over ranks that see different samples, if they are.
        width: Number of its columns, that of the bias included.
    """

    part: Part
    rest: Split | None
    width: int


def shard_of(
    matrix: WeightMatrix, data: Sequence[Any], blocks: tuple[int | None, int | None]
) -> Shard | str | None:
    """The shard of this rank; ``None`` if there is none; what is expected, if blocks do not fit.

    Args:
        matrix: Matrix.
        data: Process groups of the ranks that see different samples.
        blocks: How many neighbouring inputs, and outputs, are whole blocks of a factor; ``None``
            where there are no such blocks.
    """
    split = _over_same_samples(matrix.weight, data)
    is_whole = matrix.rows is None and matrix.weight.ndim == len(matrix.shape) == 2
    if split is None or not matrix.is_reshaped or not is_whole:
        return None
    by_rows = split.dim == 0
    n, k = split.ends[-1], blocks[by_rows]
    what = "outputs" if by_rows else "inputs"
    if k is None or any(end % k and end != n for end in split.ends):
        got = "one that mixes all or has one number for all" if k is None else f"blocks of {k}"
        return (
            f"a diagonal structure, or blocks that divide the shard of {split.ends[0]} {what}: "
            f"got {got}"
        )
    has_tail = not by_rows and matrix.bias is not None
    if has_tail and n % k:
        return f"blocks that divide all {n} inputs, for the bias is one more: got blocks of {k}"
    rests = [_over_samples(p, data, split) for p in matrix.parameters]
    is_alike = matrix.bias is None or (_over_same_samples(matrix.bias, data) is not None) == by_rows
    if any(rest != rests[0] for rest in rests) or not is_alike:
        return "weight and bias that are split alike"
    me = dist.get_rank(split.group)
    ends = tuple(end + (has_tail and end == n) for end in split.ends)
    side = split.side(me)
    part = Part(
        "grad" if by_rows else "input", split.group, ends, me, int(has_tail and ends[me] < ends[-1])
    )
    columns = matrix.weight.shape[1] if by_rows else side.stop - side.start
    return Shard(part, rests[0], columns + (matrix.bias is not None))


def _over_same_samples(p: Any, data: Sequence[Any]) -> Split | None:
    """How a parameter is split over ranks that see the same samples; ``None`` if it is not."""
    found = _splits(p, data, over_data=False)
    return found[0][0] if len(found) == 1 and found[0][1] else None


def _over_samples(p: Any, data: Sequence[Any], split: Split) -> Split | None:
    """How the rows of a shard are split over ranks that see different samples, if they are."""
    found = _splits(p, data, over_data=True)
    if not found:
        return None
    group, rows = found[0][0].group, p.shape[0]
    if split.dim == 0:
        side = split.side(dist.get_rank(split.group))
        rows = side.stop - side.start
    return Split(group, 0, ends_of(rows, dist.get_world_size(group)))


def _splits(p: Any, data: Sequence[Any], *, over_data: bool) -> list[tuple[Split, bool]]:
    """The splits of a parameter over process groups, and whether each is into neighbouring rows."""
    names = {group.group_name for group in data}
    if not is_distributed(p):
        return []
    found = []
    for i, placement in enumerate(p.placements):
        group = p.device_mesh.get_group(i)
        if (group.group_name in names) == over_data and not placement.is_replicate():
            dim = getattr(placement, "dim", 0)
            ends = ends_of(p.shape[dim], dist.get_world_size(group))
            found.append((Split(group, dim, ends), placement.is_shard()))
    return found
