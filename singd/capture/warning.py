"""Warnings that point to the line of whoever uses the package."""

from __future__ import annotations

import sys
import warnings
from types import FrameType


def warn_user(message: str) -> None:
    """Warn at the first line up the stack that is neither of this package nor of PyTorch."""
    level, frame = 1, sys._getframe()
    while _is_ours(frame) and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _is_ours(frame: FrameType) -> bool:
    package = frame.f_globals.get("__name__", "").partition(".")[0]
    return package in ("singd", "torch")
