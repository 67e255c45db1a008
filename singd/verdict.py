"""Whether a step was taken: known at once, or on a GPU one step later, so that nothing waits.

There a step that may have to be skipped is queued whole, and a truth value on the device guards all
that it writes. The host reads a copy of that value at the start of the next step, when it has come.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from singd.options import Group


class Verdict:
    """Counts skipped steps. Held as one object, for the reason that :class:`Passes` is one."""

    def __init__(self) -> None:
        self.skipped = self.in_row = 0
        self.late = False  # a skip was found out since the last step, maybe after a forward pass
        self._held: tuple[Tensor, torch.cuda.Event | None, list[int]] | None = None

    def count(self, *, taken: bool) -> None:
        """Count a step, now that it is known whether it was taken."""
        self.skipped += not taken
        self.in_row = 0 if taken else self.in_row + 1

    def hold(self, ok: Tensor, counted: Iterable[int]) -> None:
        """Leave for later whether the step was taken.

        Args:
            ok: A truth value on the device.
            counted: The places of the groups whose steps were counted as if it were.
        """
        host, event = ok.to("cpu", non_blocking=True), None  # pinned, where that is a copy
        if ok.is_cuda:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(ok.device))
        self._held = host, event, list(counted)

    def settle(self, groups: Sequence[Group]) -> None:
        """Find out what was left for later; waits for the step that it is about, and no more."""
        if self._held is None:
            return
        (host, event, counted), self._held = self._held, None
        if event is not None:
            event.synchronize()
        taken = bool(host)
        self.count(taken=taken)
        if not taken:
            self.late = True
            for place in counted:
                groups[place]["step"] -= 1


def reading_waits(groups: Iterable[Group]) -> bool:
    """Whether to read a number is to wait: where all parameters are on one CUDA device."""
    devices = {p.device for group in groups for p in group["params"]}
    return len(devices) == 1 and devices.pop().type == "cuda"


def write_(kept: Tensor, new: Tensor, ok: Tensor | None) -> Tensor:
    """``kept <- new``, unless there is a truth value and it says no; returns ``kept``."""
    if ok is None:
        return kept.copy_(new)
    return torch.where(ok, new.to(kept.dtype), kept, out=kept)
