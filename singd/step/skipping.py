"""Skipped steps: known at once, or on a GPU one step later, so that nothing waits.

There a step that may have to be skipped is queued whole, and ``found_inf``, a truth value on the
device, guards all that it writes. The host reads a copy of it at the start of the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


class SkippedSteps:
    """Counts of skipped steps."""

    def __init__(self) -> None:
        self.total = self.in_row = 0
        self._pending: tuple[Tensor, torch.cuda.Event | None, Callable[[], None]] | None = None

    def count(self, *, skipped: bool) -> None:
        """Count a step, now that it is known whether it was skipped."""
        self.total += skipped
        self.in_row = self.in_row + 1 if skipped else 0

    def defer(self, found_inf: Tensor, undo: Callable[[], None]) -> None:
        """Count a step later, when ``found_inf`` has come from the device.

        Args:
            found_inf: Whether it was skipped, a truth value on the device.
            undo: Function that is called then, if it was.
        """
        host, event = found_inf.to("cpu", non_blocking=True), None  # pinned, where that is a copy
        if found_inf.is_cuda:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(found_inf.device))
        self._pending = host, event, undo

    def settle(self) -> None:
        """Count what was deferred; waits for the step that it is about, and no more."""
        if self._pending is None:
            return
        (host, event, undo), self._pending = self._pending, None
        if event is not None:
            event.synchronize()
        skipped = bool(host)
        self.count(skipped=skipped)
        if skipped:
            undo()

    def check(self, cause: str | None, limit: int | None) -> None:
        """Raise ``FloatingPointError`` if this step was one too many.

        Args:
            cause: Why it was skipped; ``None`` if it was taken.
            limit: Steps in a row that may be skipped.
        """
        if cause and limit is not None and self.in_row >= limit > 0:
            raise FloatingPointError(f"{cause} in {self.in_row} steps in a row")


def reading_waits(parameters: Iterable[Tensor]) -> bool:
    """Whether to read a number is to wait: where all parameters are on one CUDA device."""
    devices = {p.device for p in parameters}
    return len(devices) == 1 and devices.pop().type == "cuda"


def write_(target: Tensor, new: Tensor, unless: Tensor | None) -> Tensor:
    """``target <- new``, except where the truth value ``unless`` is true; returns ``target``."""
    if unless is None:
        return target.copy_(new)
    return torch.where(unless, target, new.to(target.dtype), out=target)


def write_all_(targets: Sequence[Tensor], new: Sequence[Tensor], unless: Tensor | None) -> None:
    """:func:`write_` of many tensors."""
    if targets and unless is None:
        torch._foreach_copy_(list(targets), list(new))
        return
    for target, one in zip(targets, new, strict=True):
        write_(target, one, unless)
