"""One process, and data parallelism: every rank holds everything, and ranks share the samples.

Statistics are sums with counts, so ranks only have to add them up.
"""

from __future__ import annotations

import math
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from singd.capture.statistics import KroneckerStatistics, Summand
from singd.capture.weight_matrix import WeightMatrix
from singd.ops.grouping import grouped
from singd.placement.base import Placement, Statistics
from singd.placement.places import Demand

_PACK = 1 << 24  # numbers from which no more are reduced at a time: they are copied for it


class OneProcess(Placement):
    """There is one rank: all is as in the base class."""


class DataParallel(Placement):
    """Every rank holds the whole model and sees some of the samples.

    Args:
        groups: Process groups of the ranks, one for each dimension of their mesh; ``None`` among
            them is that of all ranks.
        averages_gradients: Whether gradients are still to be averaged, as they are not in a model
            wrapped in :class:`~torch.nn.parallel.DistributedDataParallel`.
        wrapper: That wrapper, which is not kept alive.
    """

    def __init__(
        self, groups: Sequence[Any], averages_gradients: bool, wrapper: Any = None
    ) -> None:
        super().__init__()
        self._wrapper = (lambda: None) if wrapper is None else weakref.ref(wrapper)
        self.groups, self.averages_gradients = list(groups), averages_gradients
        self._is_checked = False
        self._demand: Callable[[WeightMatrix], Demand] | None = None
        self.size = math.prod(dist.get_world_size(group) for group in self.groups)
        self.has_others = self.size > 1

    def place(
        self, layouts: Mapping[WeightMatrix, Any], demand: Callable[[WeightMatrix], Demand]
    ) -> None:
        """Factors are everywhere."""
        self._demand = demand

    def traffic(self, matrix: WeightMatrix) -> float:
        """Bytes of statistics that this rank sends in a step, on average over steps."""
        assert self._demand is not None
        return self.foresee({matrix: self._demand(matrix)})[matrix]

    def foresee(self, demands: Mapping[WeightMatrix, Demand]) -> dict[WeightMatrix, float]:
        """Bytes that this rank would send in a step for matrices whose factors needed this."""
        sizes = [dist.get_world_size(group) for group in self.groups]
        share = sum(2 * (n - 1) / n for n in sizes)
        return {m: share * d.statistics / d.interval for m, d in demands.items()}

    def check_same(self, names: Callable[[], Sequence[str]], device: torch.device) -> None:
        """Raise unless all ranks have the same parameters; they are compared once."""
        if self._is_checked:
            return
        own = names()
        number = zlib.crc32("\n".join(own).encode())
        most = torch.tensor([number, -number], device=device)
        for group in self.groups:
            dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
        if most.tolist() != [number, -number]:
            raise ValueError(
                f"model: ranks that share the data have other parameters than {own[0]}, ... here: "
                "an optimizer of a pipeline stage needs process_group, the ranks of the same stage"
            )
        self._is_checked = True

    def is_reducing(self) -> bool:
        """Whether this is no pass under ``no_sync``."""
        return bool(getattr(self._wrapper(), "require_backward_grad_sync", True))

    def agree(self, numbers: Sequence[float | Tensor], like: Tensor) -> list[float]:
        """The sums over all ranks, in one reduction."""
        device = like.device
        sums = torch.stack(
            [torch.as_tensor(n, dtype=torch.float64, device=device) for n in numbers]
        )
        sum_(sums, self.groups)
        return [float(n) for n in sums.tolist()]

    def reduce(self, statistics: Statistics) -> Statistics:
        """The sums over all ranks, in place, of matrices of which some rank saw rows."""
        if not statistics:
            return statistics
        sum_packed_([s for one in statistics.values() for s in one.summands()], self.groups)
        return self.count(statistics)

    def count(self, statistics: Statistics) -> Statistics:
        """Statistics with the counts of all ranks, of matrices of which some rank saw rows."""
        device = next(iter(statistics.values())).input.tensors()[0].device
        counts = [(one.rows, one.samples, one.loss_terms) for one in statistics.values()]
        numbers = torch.tensor(counts, dtype=torch.float64, device=device)
        found: dict[WeightMatrix, KroneckerStatistics] = {}
        summed = sum_(numbers, self.groups).tolist()
        for (matrix, one), own in zip(statistics.items(), summed, strict=True):
            rows, samples, loss_terms = (int(n) for n in own)
            if rows:
                found[matrix] = replace(one, rows=rows, samples=samples, loss_terms=loss_terms)
        return found

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Average gradients over the ranks; a parameter that some rank used has one on all."""
        for p in parameters if self.averages_gradients else ():
            if p.grad is not None:
                sum_(p.grad, self.groups)
                p.grad.div_(self.size)


def sum_(t: Tensor, groups: Iterable[Any]) -> Tensor:
    """The sum of ``t`` over all ranks of a mesh with these groups, in place; returns ``t``."""
    for group in groups:
        dist.all_reduce(t, group=group)
    return t


def sum_packed_(summands: Sequence[Summand], groups: Sequence[Any], to: int | None = None) -> None:
    """:func:`sum_` of many tensors, in few reductions; of symmetric matrices one half is sent.

    Args:
        summands: Tensors, changed in place.
        groups: Process groups of a mesh; one, if the sum is for one rank.
        to: The rank that needs the sum, if not all do.
    """
    for pack in _packs(summands) if groups else ():
        flat = torch.cat([s.sent() for s in pack])
        if to is None:
            sum_(flat, groups)
        else:
            dist.reduce(flat, group=groups[0], group_dst=to)
        if to is None or to == dist.get_rank(groups[0]):
            for s, piece in zip(pack, flat.split([s.numel() for s in pack]), strict=True):
                s.receive_(piece)


def _packs(summands: Iterable[Summand]) -> Iterator[list[Summand]]:
    """Tensors of one data type and device, together :data:`_PACK` numbers or little more."""
    for same in grouped(summands, lambda s: (s.tensor.dtype, s.tensor.device)):
        pack: list[Summand] = []
        for s in same:
            pack.append(s)
            if sum(each.numel() for each in pack) >= _PACK:
                yield pack
                pack = []
        if pack:
            yield pack
