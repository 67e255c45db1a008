"""Steps in a CUDA graph: what the host decides, it decides at the capture, for every replay."""

from __future__ import annotations

import torch


def is_capturing() -> bool:
    """Whether what runs now is recorded, to be replayed without Python."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
