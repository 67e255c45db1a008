"""Bytes that a rank gives to collectives."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch.distributed as dist

from singd.placement import replicated, sums

SUM_PACKED, REDUCE_SCATTER = replicated.sum_packed_, sums.reduce_scatter


class Counting:
    """Counts what this rank sends if collectives go around in a ring.

    Attributes:
        bytes: Bytes of gradients, directions and statistics.
        others: Bytes of other sums, which are of a few numbers.
    """

    def __init__(self) -> None:
        self.bytes, self.others = 0.0, 0.0
        self._is_summing = False

    def __enter__(self) -> Counting:
        self._patches = []
        for name in ("all_reduce", "reduce", "all_gather", "all_to_all_single"):
            self._patches.append(mock.patch.object(dist, name, self._counted(name)))
        for module in (replicated, sums):
            self._patches.append(mock.patch.object(module, "sum_packed_", self._summing))
        self._patches.append(mock.patch.object(sums, "reduce_scatter", self._scattering))
        for patch in self._patches:
            patch.start()
        return self

    def _summing(self, *args: Any, **kwargs: Any) -> None:
        with mock.patch.object(self, "_is_summing", True):
            SUM_PACKED(*args, **kwargs)

    def _scattering(self, sent: Any, count: int, group: Any) -> Any:
        n = dist.get_world_size(group)
        self.bytes += (n - 1) / n * sent.nbytes
        return REDUCE_SCATTER(sent, count, group)

    def __exit__(self, *_: object) -> None:
        for patch in self._patches:
            patch.stop()

    def _counted(self, name: str) -> Any:
        original = getattr(dist, name)

        def counted(*args: Any, group: Any = None, **kwargs: Any) -> Any:
            n, me = dist.get_world_size(group), dist.get_rank(group)
            if name == "all_gather":
                sent = (n - 1) * args[1].nbytes
            elif name == "all_to_all_single":
                sent = args[1].nbytes - args[3][me] * args[1].element_size()
            else:
                sent = (1 + (name == "all_reduce")) * (n - 1) / n * args[0].nbytes
                if not self._is_summing:
                    self.others += sent
                    sent = 0
            self.bytes += sent
            return original(*args, group=group, **kwargs)

        return counted
