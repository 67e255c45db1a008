"""Steps in a CUDA graph: what the host decides, it decides at the capture, for every replay."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from singd.base import KroneckerOptimizer


def capturing() -> bool:
    """Whether what runs now is recorded, to be replayed without Python."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def check(optimizer: KroneckerOptimizer) -> None:
    """Refuse a capture of what needs the host.

    Raises:
        RuntimeError: If the step would read a number off the device.
    """
    if optimizer.max_skipped is not None or optimizer.telemetry is not None:
        raise RuntimeError(
            "a step in a CUDA graph cannot look at its numbers: expected max_skipped=None and "
            f"telemetry=None, got {optimizer.max_skipped} and {optimizer.telemetry}"
        )
