"""The seam for placements: what a step asks of the ranks that train a model together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor

from singd.capture.statistics import KroneckerStatistics
from singd.capture.weight_matrix import WeightMatrix, stack_gradients

Statistics = Mapping[WeightMatrix, KroneckerStatistics]


class Placement(ABC):
    """Which ranks hold which part of parameters, statistics and factors.

    Every rank calls the methods in the same order. Numbers that belong to all ranks (norms, inner
    products, whether all is finite) are sums over what a rank holds; :meth:`complete` adds them up.
    """

    size = 1
    """Number of ranks that share the data."""

    @abstractmethod
    def agree(self, numbers: Sequence[float | Tensor], like: Tensor) -> list[float]:
        """The sums over all ranks of numbers that decide what a step does.

        Args:
            numbers: As many on every rank.
            like: Tensor on the device that the ranks communicate by.
        """

    @abstractmethod
    def reduce(self, statistics: Statistics) -> Statistics:
        """The sums of statistics over all ranks, of the same matrices on every rank."""

    @abstractmethod
    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Average ``.grad`` over all ranks, in place, unless that was done in the backward pass."""

    @abstractmethod
    def complete(self, sums: Tensor) -> Tensor:
        """The sums over all ranks of what a step has summed over the parts that a rank holds."""

    def gradients(self, matrices: Sequence[WeightMatrix]) -> Tensor:
        """Whole gradients of equal matrices, ``[matrices, ..., d_out, d_in]``."""
        return stack_gradients(matrices)
