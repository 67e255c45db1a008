"""What users say and ask between steps: which passes count, and what there is of factors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from singd.capture.weight_matrix import WeightMatrix
from singd.methods.base import Factors, Method
from singd.step.pipeline import Parts
from structured import Structure


@dataclass(frozen=True)
class Stored:
    """What an optimizer stores of one matrix, with what says how it was made.

    Attributes:
        matrix: Matrix of a layer.
        factors: Its factors.
        structures: Their structures.
        group: Options of its group.
        method: Method that made the factors.
    """

    matrix: WeightMatrix
    factors: Factors
    structures: tuple[Structure, ...]
    group: Mapping[str, Any]
    method: Method


class Passes:
    """Contexts and calls around the passes of a model, a part of :class:`KroneckerOptimizer`."""

    param_groups: list[dict[str, Any]]
    _parts: Parts
    _ensure: Callable[[], None]

    def stored_factors(self) -> Iterator[Stored]:
        """The factors of every matrix as they are, views.

        Reading them waits for the last step, where it is not known yet whether it was skipped.

        Raises:
            ValueError: If another process has some of them.
        """
        parts = self._parts
        parts.skipping.settle()
        self._ensure()
        for matrix, group in parts.parameters.preconditioned().items():
            if not parts.placement.holds(matrix) or parts.placement.part_of(matrix) is not None:
                raise ValueError(
                    f"{matrix.name}: expected its factors in this process, got those of another: "
                    "load a checkpoint into an optimizer of one process"
                )
            structures = parts.store.structures(matrix, group)
            yield Stored(matrix, parts.store.factors(matrix), structures, group, parts.method)

    def blank_factors(self, options: Mapping[str, Any]) -> Iterator[tuple[WeightMatrix, Factors]]:
        """Factors of zeros that take no memory, of every matrix of a group.

        Args:
            options: Options of the group; its ``"params"`` say which matrices are meant.
        """
        given = set(options["params"])
        for matrix in self._parts.parameters.matrices:
            if matrix.weight in given:
                yield matrix, self._parts.store.template(matrix, options)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within this context forward passes are not captured."""
        capture = self._parts.capture
        before, capture.is_paused = capture.is_paused, True
        try:
            yield
        finally:
            capture.is_paused = before

    def count_terms(self, terms: float | Tensor) -> None:
        """Say how many terms the loss of this backward pass is a mean over.

        For means over a number that the layers cannot know, such as the tokens that are not
        padding. Counts add up over backward passes, and replace those of ``loss_average`` at the
        coming step. ``zero_grad`` may come between the count and its backward pass.

        Args:
            terms: Number of terms; a tensor costs no wait for the device.
        """
        capture = self._parts.capture
        seen = [m for m, a in capture.accumulators.items() if a.total is not None]
        if not capture.is_sampled and any(m.weight.grad is None for m in seen):
            capture.count.end_step()  # of gradients that were reset by the model
            capture.discard()
        capture.count.add(terms)

    def close(self) -> None:
        """Remove every hook from the model."""
        self._parts.capture.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def curvature(self) -> Iterator[None]:
        """Within this context backward passes feed the curvature alone.

        For the true Fisher: sample labels from the model's output and call ``backward`` on the loss
        of them in here. Gradients are as before when it ends, and until the next step no other pass
        is captured.
        """
        capture = self._parts.capture
        capture.count.end_step()
        capture.discard()
        saved = [(p, p.grad) for group in self.param_groups for p in group["params"]]
        for p, _ in saved:
            p.grad = None
        capture.is_sampled = False
        try:
            yield
        finally:
            capture.is_sampled = True
            for p, grad in saved:
                p.grad = grad

    @property
    def skipped(self) -> int:
        """Steps that were skipped so far; waits for the last one where that is not known yet."""
        self._parts.skipping.settle()
        return self._parts.skipping.total
