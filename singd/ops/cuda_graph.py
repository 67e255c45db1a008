"""Steps in a CUDA graph: what the host decides, it decides at the capture, for every replay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch


def is_capturing() -> bool:
    """Whether what runs now is recorded, to be replayed without Python."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def check_recordable(
    max_skipped: int | None, telemetry: object, groups: Iterable[Mapping[str, Any]]
) -> None:
    """Raise ``RuntimeError`` if a step that is recorded would read a number, or end its burn-in."""
    if max_skipped is not None or telemetry is not None:
        raise RuntimeError(
            "a step in a CUDA graph cannot look at its numbers: expected max_skipped=None and "
            f"telemetry=None, got {max_skipped} and {telemetry}"
        )
    for group in groups:
        step, burn_in = group["step"], group.get("burn_in", 0)
        if step < burn_in:
            raise RuntimeError(
                "replays of a step of the burn-in would all be of it: expected burn_in=0 or at "
                f"least {burn_in} steps before a CUDA graph is recorded, got step {step}"
            )
