"""What the capture asks of a step to come: which passes count, and how they are summed up."""

from __future__ import annotations

import functools
import random
import threading
import weakref
from collections.abc import Callable

from singd.capture.observer import Request
from singd.capture.statistics import Columns, KroneckerStatistics, Side, Statistic
from singd.capture.weight_matrix import WeightMatrix
from singd.ops.parts import Part
from singd.step.groups import Group, is_due
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

    def request(self, matrix: WeightMatrix) -> Request:
        """As the options of its group say; there are factors of ``matrix`` then."""
        parts = self.parts
        group = parts.parameters.group_of[matrix.weight]
        self._prepare(matrix, group)
        part = parts.placement.part_of(matrix)
        keeps_last = group["sample"] == "last"
        every, phase = sampling(group)
        return Request(
            functools.partial(self._summarize, matrix, group, part),
            functools.partial(self._piece_bytes, matrix, group),
            group["kfac_approx"],
            None if part is None or part.is_scattered else part,
            keeps_last,
            not keeps_last or parts.placement.is_reducing(),
            every,
            phase,
        )

    def _prepare(self, matrix: WeightMatrix, group: Group) -> None:
        """Make factors, unless they are there."""
        ensure = self._ensure()
        with self._lock:
            if ensure is not None and not self.parts.store.holds(matrix, group):
                ensure()

    def _piece_bytes(self, matrix: WeightMatrix, group: Group) -> int | None:
        """As large as the factor: a product with fewer rows than columns is slow."""
        first = next(iter(self.parts.store.summarizing(matrix, group, "input").members().values()))
        return None if isinstance(first, Diagonal) else sum(t.nbytes for t in first.tensors())

    def _summarize(
        self, matrix: WeightMatrix, group: Group, part: Part | None, side: Side, columns: Columns
    ) -> Statistic:
        """The statistic that the method asks for."""
        parts = self.parts
        factors = parts.store.summarizing(matrix, group, side)
        statistic = parts.method.summarize(factors, side, columns, group)
        if statistic.kind == "whitened":
            is_scattered = part is not None and part.is_scattered and part.side == side
            if is_scattered or not parts.placement.holds(matrix):
                raise RuntimeError(
                    f"{matrix.name}: its statistics need its factors, which other ranks have: make "
                    "the optimizer after torch.set_float32_matmul_precision"
                )
        return statistic

    def sends(self, matrix: WeightMatrix) -> bool:
        """Whether one rank has the factors of ``matrix``, and the next step updates them."""
        if not self.parts.placement.has_shards or not self.is_captured(matrix):
            return False
        self._prepare(matrix, self.parts.parameters.group_of[matrix.weight])
        return self.parts.placement.owner_of(matrix) is not None

    def send(self, matrix: WeightMatrix, one: KroneckerStatistics) -> KroneckerStatistics:
        """To that rank."""
        return self.parts.placement.send(matrix, one)


def sampling(group: Group) -> tuple[int, float]:
    """The option ``sample``, and a number that is new at each step, the same on all ranks."""
    every = group["sample"]
    if every in (1, "last"):
        return 1, 0.0
    return every, random.Random(f"{group['seed']} {group['step']}").random()
