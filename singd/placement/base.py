"""The seam for placements: what a step asks of the ranks that train a model together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from singd.capture.statistics import KroneckerStatistics
from singd.capture.weight_matrix import WeightMatrix, stack_apart, stack_gradients
from singd.ops.parts import Part
from singd.placement.holding import Holding, Kept
from singd.placement.places import Demand

Statistics = Mapping[WeightMatrix, KroneckerStatistics]

_HOLDINGS = 256  # sets of equal matrices that are remembered


@dataclass
class Work:
    """Equal matrices whose directions this rank can make.

    Attributes:
        matrices: Matrices with a gradient.
        is_apart: Whether gradients of weights and biases are best given apart.
        apply: Makes their directions of gradients ``[matrices, ..., d_out, d_in]``.
        apply_input: The half of it that may be given some rows; what it makes may be wider.
        apply_grad: The other half, which may be given some columns.
        apply_rows: Makes the directions of some ``rows``, where they depend on no others.
        apply_apart: Makes them of gradients of weights and of biases.
    """

    matrices: list[WeightMatrix]
    is_apart: bool
    apply: Callable[[Tensor], Tensor]
    apply_input: Callable[[Tensor], Tensor]
    apply_grad: Callable[[Tensor], Tensor]
    apply_rows: Callable[..., Tensor]
    apply_apart: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass
class Made:
    """Matrices, and what this rank holds of their directions and, if asked for, gradients."""

    matrices: list[WeightMatrix]
    holding: Holding
    gradient: Kept | None
    direction: Kept


class Placement:
    """Which ranks hold which part of parameters, statistics and factors; here one has everything.

    Every rank calls the methods in the same order. Numbers that belong to all ranks (norms, inner
    products, whether all is finite) are sums over what a rank holds; :meth:`complete` adds them up.
    """

    size = 1
    """Number of ranks that share the data."""

    has_others = False
    """Whether other ranks must do the same in a step."""

    has_shards = False
    """Whether this rank holds a part of some parameters."""

    def __init__(self) -> None:
        self._holdings: dict[tuple[WeightMatrix, ...], Holding] = {}

    def prepare(self) -> None:
        """Called before a step, or whenever the parameters of the model are looked up."""
        return

    def place(
        self, layouts: Mapping[WeightMatrix, Any], demand: Callable[[WeightMatrix], Demand]
    ) -> None:
        """Choose where the factors of matrices are worked on; what was chosen before stays.

        Args:
            layouts: All matrices that are preconditioned, each with what its factors depend on: if
                that changes it is placed anew.
            demand: Says what the factors of a matrix need.
        """
        return

    def place_of(self, matrix: WeightMatrix) -> str:
        """Where the factors of a matrix are worked on, one of :data:`~singd.placement.PLACES`."""
        return "everywhere"

    def owner_of(self, matrix: WeightMatrix) -> int | None:
        """The rank that alone has the factors of a matrix; ``None`` if all have them."""
        return None

    def holds(self, matrix: WeightMatrix) -> bool:
        """Whether this rank has the factors of a matrix."""
        return True

    def part_of(self, matrix: WeightMatrix) -> Part | None:
        """The rows that this rank has of a factor of a matrix, if ranks share it."""
        return None

    def send(self, matrix: WeightMatrix, one: KroneckerStatistics) -> KroneckerStatistics:
        """The sums over all ranks of statistics, on the rank that has the factors.

        Args:
            matrix: Matrix with an owner.
            one: Statistics of this rank, which are given up.
        """
        raise NotImplementedError(f"{type(self).__name__} has no owners")

    def spread(self, items: Sequence[tuple[WeightMatrix, Tensor, Tensor | None]]) -> list[Tensor]:
        """Tensors that the owners of matrices have, in parts on all ranks, for a checkpoint.

        Args:
            items: Matrices, each with a tensor of the same shape, and the tensor of its owner.
        """
        raise NotImplementedError(f"{type(self).__name__} has no owners")

    def traffic(self, matrix: WeightMatrix) -> float:
        """Bytes that this rank sends in a step for a matrix, on average over steps."""
        return 0.0

    def foresee(self, demands: Mapping[WeightMatrix, Demand]) -> dict[WeightMatrix, float]:
        """Bytes that this rank would send in a step for matrices whose factors needed this."""
        return dict.fromkeys(demands, 0.0)

    def check_same(self, names: Callable[[], Sequence[str]], device: torch.device) -> None:
        """Raise ``ValueError``, at the first step, unless all ranks have the same parameters.

        Args:
            names: Says what stands for the parameters of this rank, in order.
            device: Device that the ranks communicate by.
        """
        return

    def is_reducing(self) -> bool:
        """Whether gradients of the pass under way are reduced, as those of the last one are."""
        return True

    def agree(self, numbers: Sequence[float | Tensor], like: Tensor) -> list[float]:
        """The sums over all ranks of numbers that decide what a step does.

        Args:
            numbers: Numbers, as many on every rank.
            like: Tensor on the device that the ranks communicate by.
        """
        return [float(number) for number in numbers]

    def reduce(self, statistics: Statistics) -> Statistics:
        """The sums of statistics over all ranks, of the same matrices on every rank."""
        return statistics

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Average ``.grad`` over all ranks, in place, unless that was done in the backward pass."""
        return

    def complete(self, sums: Tensor) -> Tensor:
        """The sums over all ranks of what a step has summed over the parts that a rank holds."""
        return sums

    def complete_norms(self, norms: Tensor) -> Tensor:
        """The norms of what all ranks hold, from those of what a rank counts."""
        return norms

    def gradients(self, matrices: Sequence[WeightMatrix]) -> Tensor:
        """Whole gradients of equal matrices, ``[matrices, ..., d_out, d_in]``."""
        return stack_gradients(matrices)

    def directions(
        self,
        works: Iterable[Work],
        alike: Iterable[Sequence[WeightMatrix]],
        *,
        with_gradients: bool,
    ) -> Iterator[Made]:
        """What this rank holds of all directions.

        Args:
            works: Directions that this rank can make, as many as it has factors for.
            alike: All matrices with a gradient, one list for each group of parameters.
            with_gradients: Whether gradients, which may be copies, are given as well.
        """
        for work in works:
            holding = self.holding(work.matrices)
            if work.is_apart and not self.has_shards:  # to join them would be a copy of both
                G = stack_apart(work.matrices)
                D = [*work.apply_apart(*G)]
            else:
                G = [self.gradients(work.matrices)]
                D = [work.apply(*G)]
            D, kept = holding.keep(D), holding.keep(G) if with_gradients else None
            del G  # the next gradients take its memory
            yield Made(work.matrices, holding, kept, D)

    def holding(self, matrices: Sequence[WeightMatrix]) -> Holding:
        """What this rank holds of equal matrices; made once, as long as the same come again."""
        key = tuple(matrices)
        if key not in self._holdings:
            if len(self._holdings) >= _HOLDINGS:  # layers without a gradient change all the time
                self._holdings.clear()
            self._holdings[key] = self.make_holding(matrices)
        return self._holdings[key]

    def make_holding(self, matrices: Sequence[WeightMatrix]) -> Holding:
        """What :meth:`holding` gives."""
        return Holding(matrices)
