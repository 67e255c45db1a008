"""Steps in a CUDA graph: what the host decides, it decides at the capture, for every replay."""

from __future__ import annotations

import torch


def is_capturing() -> bool:
    """Whether what runs now is recorded, to be replayed without Python."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def check_recordable(max_skipped: int | None, telemetry: object) -> None:
    """Raise ``RuntimeError`` if a step that is recorded would read a number."""
    if max_skipped is not None or telemetry is not None:
        raise RuntimeError(
            "a step in a CUDA graph cannot look at its numbers: expected max_skipped=None and "
            f"telemetry=None, got {max_skipped} and {telemetry}"
        )
