"""What is summed in float32 at least and rounded once: numbers of members in 16 bits.

A sum of logarithms that is rounded at each part of a member loses a digit with each of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from structured._core.composite import Composite
from structured._core.numbers import at_least_float32
from structured._core.stored import Stored


def round_once(cls: type) -> None:
    """Wrap the ``logdet`` that ``cls`` defines itself: it sees numbers in float32 at least."""
    name = "logdet"
    if name in cls.__dict__:
        setattr(cls, name, _rounded_once(cls.__dict__[name]))


def _rounded_once(method: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    @functools.wraps(method)
    def wrapper(self: Any) -> Tensor:
        dtype = self.dtype
        if at_least_float32(dtype) == dtype or not _has_numbers(self):
            return method(self)
        return method(self.to(at_least_float32(dtype))).to(dtype)

    return wrapper


def _has_numbers(A: Any) -> bool:
    """Whether all of it can be converted: an operator of a user's own has its dtype."""
    if isinstance(A, Composite):
        return all(map(_has_numbers, A.parts))
    return isinstance(A, Stored)
