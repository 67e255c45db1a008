"""What the capture asks of whoever decides what is captured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from singd.capture.statistics import Columns, KroneckerStatistics, Side, Statistic
from singd.capture.weight_matrix import WeightMatrix
from singd.ops.parts import Part


@dataclass(slots=True)
class Request:
    """How what passes through a weight is summed up.

    Attributes:
        summarize: Gives the statistic of one side of one use.
        piece_bytes: Gives the bytes of patches that are summed at a time, at least; ``None`` for
            all at once.
        approximation: ``"expand"`` or ``"reduce"``.
        part: The inputs or output gradients that this rank sums up, if not all.
        keeps_last: Whether statistics are those of the last pass before a step, in place of all.
        is_read: Whether the pass under way may be one that statistics are of.
        every: How many rows each row that is read stands for.
        phase: Where to begin with them, in [0, 1).
    """

    summarize: Callable[[Side, Columns], Statistic]
    piece_bytes: Callable[[], int | None]
    approximation: str
    part: Part | None
    keeps_last: bool
    is_read: bool
    every: int
    phase: float


class Observer(Protocol):
    """Who decides what is captured, and how it is summed up."""

    def is_captured(self, matrix: WeightMatrix) -> bool:
        """Whether statistics of a pass that begins now will be used."""

    def request(self, matrix: WeightMatrix) -> Request:
        """How a use of ``matrix`` in the pass under way is summed up."""

    def sends(self, matrix: WeightMatrix) -> bool:
        """Whether statistics go to another rank as soon as their gradient is reduced."""

    def send(self, matrix: WeightMatrix, one: KroneckerStatistics) -> KroneckerStatistics:
        """Sums over ranks, on the rank that needs them; all ranks call it in the same order."""
