"""What the capture asks of a step to come: which passes count, and how they are summed up."""

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Callable

from singd.capture.statistics import Columns, KroneckerStatistics, Side, Statistic
from singd.capture.weight_matrix import WeightMatrix
from singd.ops.parts import Part
from singd.step.groups import is_due
from singd.step.pipeline import Parts
from structured import Diagonal


class StepObserver:
    """Reads the groups and factors of an optimizer, which it does not keep alive.

    Args:
        ensure: Method of the optimizer that makes factors where there are none.
    """

    parts: Parts

    def __init__(self, ensure: Callable[[], None]) -> None:
        self._ensure = weakref.WeakMethod(ensure)
        self._lock = threading.Lock()  # backward passes may run in several threads

    def is_captured(self, matrix: WeightMatrix) -> bool:
        """Whether the next step updates the factors of ``matrix``."""
        parameters = self.parts.parameters
        return is_due(parameters.group_of[matrix.weight]) and not parameters.is_handed_over(matrix)

    def prepare(self, matrix: WeightMatrix) -> None:
        """Make factors, unless they are there."""
        ensure, group = self._ensure(), self.parts.parameters.group_of[matrix.weight]
        with self._lock:
            if ensure is not None and not self.parts.store.holds(matrix, group):
                ensure()

    def piece_bytes(self, matrix: WeightMatrix) -> int | None:
        """As large as the factor: a product with fewer rows than columns is slow."""
        group = self.parts.parameters.group_of[matrix.weight]
        first = next(iter(self.parts.store.summarizing(matrix, group, "input").members().values()))
        return None if isinstance(first, Diagonal) else sum(t.nbytes for t in first.tensors())

    def sampling(self, matrix: WeightMatrix) -> tuple[int, float]:
        """The option ``sample``, and a number that is new at each step, the same on all ranks."""
        group = self.parts.parameters.group_of[matrix.weight]
        every = group["sample"]
        if every in (1, "last"):
            return 1, 0.0
        return every, random.Random(f"{group['seed']} {group['step']}").random()

    def part(self, matrix: WeightMatrix) -> Part | None:
        """What tensor parallelism leaves on this rank, if its factors are split likewise."""
        part = self.parts.placement.part_of(matrix)
        return None if part is None or part.is_scattered else part

    def keeps_last(self, matrix: WeightMatrix) -> bool:
        """Whether the option ``sample`` is ``"last"``."""
        group = self.parts.parameters.group_of[matrix.weight]
        return bool(group["sample"] == "last")

    def reads(self, matrix: WeightMatrix) -> bool:
        """Whether the pass under way may be the last: one that is not reduced is not."""
        return not self.keeps_last(matrix) or self.parts.placement.is_reducing()

    def sends(self, matrix: WeightMatrix) -> bool:
        """Whether one rank has the factors of ``matrix``, and the next step updates them."""
        if not self.parts.placement.has_shards or not self.is_captured(matrix):
            return False
        self.prepare(matrix)
        return self.parts.placement.owner_of(matrix) is not None

    def send(self, matrix: WeightMatrix, one: KroneckerStatistics) -> KroneckerStatistics:
        """To that rank."""
        return self.parts.placement.send(matrix, one)

    def summarize(self, matrix: WeightMatrix, side: Side, columns: Columns) -> Statistic:
        """The statistic that the method asks for."""
        group = self.parts.parameters.group_of[matrix.weight]
        factors = self.parts.store.summarizing(matrix, group, side)
        statistic = self.parts.method.summarize(factors, side, columns, group)
        part = self.parts.placement.part_of(matrix)
        is_scattered = part is not None and part.is_scattered and part.side == side
        is_elsewhere = not self.parts.placement.holds(matrix) or is_scattered
        if statistic.kind == "whitened" and is_elsewhere:
            raise RuntimeError(
                f"{matrix.name}: its statistics need its factors, which other ranks have: make "
                "the optimizer after torch.set_float32_matmul_precision"
            )
        return statistic

    def approximation(self, matrix: WeightMatrix) -> str:
        """``"expand"`` or ``"reduce"``."""
        approximation: str = self.parts.parameters.group_of[matrix.weight]["kfac_approx"]
        return approximation
