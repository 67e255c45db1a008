"""Checks of options: each raises ``ValueError`` that says what was expected and what is there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def in_range(name: str, value: Any, low: float, high: float, *, open_end: bool = False) -> None:
    """Raise unless ``low <= value <= high`` (or ``< high``, and where ``high`` is infinite)."""
    open_end = open_end or high == float("inf")
    good = isinstance(value, int | float | Tensor) and not isinstance(value, bool)
    good = good and (not isinstance(value, Tensor) or value.numel() == 1)
    if not good or not (low <= value and (value < high if open_end else value <= high)):
        bracket = ")" if open_end else "]"
        raise ValueError(f"{name}: expected a number in [{low:g}, {high:g}{bracket}, got {value!r}")


def choice(name: str, value: Any, known: Sequence[Any]) -> None:
    """Raise unless ``value`` is one of ``known``."""
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}")


def integer(name: str, value: Any, low: int | None = None) -> None:
    """Raise unless ``value`` is an integer, and not below ``low``."""
    if not isinstance(value, int) or isinstance(value, bool) or (low is not None and value < low):
        bound = "" if low is None else f" >= {low}"
        raise ValueError(f"{name}: expected an integer{bound}, got {value!r}")


def pair(name: str, value: Any) -> None:
    """Raise unless ``value`` has two parts, for K and for C."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError(f"{name}: expected a pair, for K and for C, got {value!r}")


def floating(name: str, value: Any) -> None:
    """Raise unless ``value`` is a real data type, or ``None``."""
    if value is not None and not (isinstance(value, torch.dtype) and value.is_floating_point):
        raise ValueError(f"{name}: expected a floating-point dtype or None, got {value!r}")
