"""Sums of statistics that not every rank needs: for owners, and for parts of factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from singd.capture.statistics import KroneckerStatistics, Statistic, Summand
from singd.capture.weight_matrix import WeightMatrix
from singd.ops.grouping import grouped
from singd.ops.parts import Part, completed, within
from singd.placement.base import Statistics
from singd.placement.replicated import sum_, sum_packed_
from singd.placement.splits import Split


def reduce_owned_(
    statistics: Statistics, owners: Mapping[WeightMatrix, int], group: Any, groups: Sequence[Any]
) -> None:
    """Add statistics up on the ranks that own their matrices, unless that was done before.

    Args:
        statistics: Sums of this rank, changed in place.
        owners: The rank that owns each matrix.
        group: Process group of these ranks.
        groups: Process groups of all ranks that see different samples.
    """
    left = {m: one for m, one in statistics.items() if not one.is_summed}
    summands = {m: one.summands() for m, one in left.items()}
    sum_packed_(
        [s for own in summands.values() for s in own], [g for g in groups if g is not group]
    )
    for rank in range(dist.get_world_size(group)):
        own = [s for m, each in summands.items() if owners[m] == rank for s in each]
        sum_packed_(own, [group], to=rank)


def sent_to(
    owner: int, one: KroneckerStatistics, group: Any, groups: Sequence[Any]
) -> KroneckerStatistics:
    """The sums over all ranks, on the owner; others keep counts alone.

    Args:
        owner: Rank that owns the matrix.
        one: Sums of this rank, which are given up.
        group: Process group of the owner.
        groups: Process groups of all ranks that see different samples.
    """
    sides = (one.input, one.grad)
    summands = one.summands()
    for t, _ in summands:
        if t.is_cuda:  # this may be called on another stream than their own
            t.record_stream(torch.cuda.current_stream())
    sum_packed_(summands, [each for each in groups if each is not group])
    sum_packed_(summands, [group], to=owner)
    if dist.get_rank(group) == owner:
        return replace(one, is_summed=True)
    gone = [s.with_tensors([t.new_zeros(()).expand(t.shape) for t in s.tensors()]) for s in sides]
    return replace(one, input=gone[0], grad=gone[1], is_summed=True, is_elsewhere=True)


def scatter(
    statistics: Statistics,
    parts: Mapping[WeightMatrix, Part],
    splits: Mapping[Tensor, Split],
    groups: Sequence[Any],
) -> Statistics:
    """The sums over all ranks of the inputs; of output gradients, those of the rows of this rank.

    Args:
        statistics: Sums of this rank, over all rows.
        parts: The rows that this rank has of the factor of each matrix.
        splits: How rows are split.
        groups: Process groups of all ranks that see different samples.
    """
    sum_packed_([s for one in statistics.values() for s in one.input.summands()], groups)
    traces = torch.cat([one.grad.value.trace().flatten().double() for one in statistics.values()])
    sums = iter(sum_(traces, groups))
    found, summed = {}, {}
    for some in grouped(
        statistics, lambda m: (parts[m].group.group_name, statistics[m].grad.value.dtype)
    ):
        group = parts[some[0]].group
        others = [each for each in groups if each is not group]
        sides = [splits[m.weight] for m in some]
        values = [statistics[m].grad.value for m in some]
        rows = [
            torch.cat(
                [
                    t.flatten()
                    for value, split in zip(values, sides, strict=True)
                    for t in within(value, split.side(rank)).tensors()
                ]
            )
            for rank in range(dist.get_world_size(group))
        ]
        longest = max(map(len, rows))  # of the first rank, which has most
        sent = torch.cat([torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows])
        own = reduce_scatter(sent, longest, group)
        sum_packed_([Summand(own, is_symmetric=False)], others)
        for matrix, value in zip(some, values, strict=True):
            part = parts[matrix]
            like = within(value, part.rows)
            counts = [t.numel() for t in like.tensors()]
            pieces = own[: sum(counts)].split(counts)
            own = own[sum(counts) :]
            found[matrix] = like.with_tensors(
                [piece.view(t.shape) for piece, t in zip(pieces, like.tensors(), strict=True)]
            )
    for matrix, one in statistics.items():
        value, kind = found[matrix], one.grad.kind
        grad = Statistic(value, kind, next(sums).to(value.dtype), parts[matrix])
        summed[matrix] = replace(one, grad=grad)
    return summed


def complete_traces(
    statistics: Statistics, parts: Mapping[WeightMatrix, Part]
) -> dict[WeightMatrix, KroneckerStatistics]:
    """Statistics with the traces of whole sides, where a rank has summed a part of one."""
    found = dict(statistics)
    some = [m for m in statistics if m in parts]
    sides: list[Statistic] = [getattr(statistics[m], parts[m].side) for m in some]
    own = [
        parts[m].counted(one.value).trace() if one.trace is None else one.trace
        for m, one in zip(some, sides, strict=True)
    ]
    for m, side, trace in zip(some, sides, completed(own, [parts[m] for m in some]), strict=True):
        whole: dict[str, Any] = {parts[m].side: Statistic(side.value, side.kind, trace, parts[m])}
        found[m] = replace(found[m], **whole)
    return found


def reduce_scatter(sent: Tensor, count: int, group: Any) -> Tensor:
    """The sum over all ranks of the ``count`` numbers that each has for this rank."""
    own = sent.new_empty(count)
    # named reduce_scatter_single since PyTorch 2.13
    function = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    function(own, sent, group=group)
    return own
