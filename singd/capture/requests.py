"""What users say of the passes to come: that they do not count, what they are means over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from singd.capture.capture import Capture
from singd.capture.weight_matrix import WeightMatrix


@contextmanager
def paused(capture: Capture) -> Iterator[None]:
    """Within this context forward passes are not captured."""
    before, capture.is_paused = capture.is_paused, True
    try:
        yield
    finally:
        capture.is_paused = before


def count_terms(capture: Capture, terms: float | Tensor) -> None:
    """Count terms of the loss of the pass to come."""
    seen = [m for m, a in capture.accumulators.items() if a.total is not None]
    if not capture.is_sampled and any(m.weight.grad is None for m in seen):
        capture.count.end_step()  # of gradients that were reset by the model
        capture.discard()
    capture.count.add(terms)


@contextmanager
def sampled(capture: Capture, parameters: Iterable[Tensor]) -> Iterator[None]:
    """Within this context passes feed the statistics alone; gradients are put back."""
    capture.count.end_step()
    capture.discard()
    saved = [(p, p.grad) for p in parameters]
    for p, _ in saved:
        p.grad = None
    capture.is_sampled = False
    try:
        yield
    finally:
        capture.is_sampled = True
        for p, grad in saved:
            p.grad = grad


def restart(capture: Capture, changed: Mapping[WeightMatrix, bool]) -> None:
    """Forget statistics that are of no use to factors that changed.

    Args:
        capture: What holds the statistics.
        changed: Matrices whose factors changed, and whether their structures did.
    """
    for matrix, is_restructured in changed.items():
        accumulator = capture.accumulators.get(matrix)
        total = None if accumulator is None else accumulator.total
        if accumulator is None or total is None:
            continue
        if is_restructured or "whitened" in (total.input.kind, total.grad.kind):
            accumulator.discard(held=True)
