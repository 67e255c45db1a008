"""What the capture asks of whoever decides what is captured."""

from __future__ import annotations

from typing import Protocol

from singd.capture.statistics import Columns, KroneckerStatistics, Side, Statistic
from singd.capture.weight_matrix import WeightMatrix
from singd.ops.parts import Part


class Observer(Protocol):
    """Who decides what is captured, and how it is summed up."""

    def is_captured(self, matrix: WeightMatrix) -> bool:
        """Whether statistics of a pass that begins now will be used."""

    def prepare(self, matrix: WeightMatrix) -> None:
        """Called before the statistics of a use are made."""

    def piece_bytes(self, matrix: WeightMatrix) -> int | None:
        """Bytes of patches that are summed at a time, at least; ``None`` for all at once."""

    def sampling(self, matrix: WeightMatrix) -> tuple[int, float]:
        """How many rows each row that is read stands for, and where to begin, in [0, 1)."""

    def part(self, matrix: WeightMatrix) -> Part | None:
        """The inputs or output gradients that this rank sums up, if not all."""

    def keeps_last(self, matrix: WeightMatrix) -> bool:
        """Whether statistics are those of the last pass before a step, in place of all."""

    def reads(self, matrix: WeightMatrix) -> bool:
        """Whether the pass under way may be one that statistics are of."""

    def sends(self, matrix: WeightMatrix) -> bool:
        """Whether statistics go to another rank as soon as their gradient is reduced."""

    def send(self, matrix: WeightMatrix, one: KroneckerStatistics) -> KroneckerStatistics:
        """Sums over ranks, on the rank that needs them; all ranks call it in the same order."""

    def summarize(self, matrix: WeightMatrix, side: Side, columns: Columns) -> Statistic:
        """The statistic of one side of one use."""

    def approximation(self, matrix: WeightMatrix) -> str:
        """``"expand"`` or ``"reduce"``."""
