"""Whether a space is an algebra: a random product tells, at the first use of one.

The default of a product writes it out and reads back the nearest member. If products of members
are members, that is exact; if not, it is another matrix, without an error. So the first default
that relies on it tries one product of two random members, for each structure and size.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor

from structured._core.member import Member
from structured._core.statics import are_fake
from structured._core.stored import zero_of

M_ = TypeVar("M_", bound=Member)

_OUTSIDE = 1e-6  # of the norm of a product: more than rounding
_REMEMBERED = 1024  # structures and sizes

# By structure and size; static tensors are known by their id, and kept: one may be used again.
_TRIED: dict[tuple[Any, ...], tuple[Tensor, ...]] = {}
_REPORTED: set[type] = set()


def read(member: M_, M: Tensor) -> M_:
    """The member with the dense matrix ``M [..., n, n]``, one that every algebra holds."""
    statics = member.static_tensors()
    if not (M.is_meta or are_fake(statics)):
        _try_once(member.key(len(member.batch_shape)), *statics)
    return member.orthogonal_project(M)


def forget() -> None:
    """The next use of each structure is as the first."""
    _TRIED.clear()
    _REPORTED.clear()


def _try_once(key: tuple[Any, ...], *statics: Tensor) -> None:
    """Warn, once for each class, if the space lacks what an algebra has."""
    full = (key, *map(id, statics))
    if full in _TRIED:
        return
    if len(_TRIED) == _REMEMBERED:
        del _TRIED[next(iter(_TRIED))]
    _TRIED[full] = statics
    cls = key[0]
    with ThreadPoolExecutor(1) as thread:  # transforms, modes and autocast belong to a thread
        missing = thread.submit(_missing, key, statics).result()
    if missing and cls not in _REPORTED:
        _REPORTED.add(cls)
        warnings.warn(
            f"{cls.__name__} is no algebra: {missing}, so the nearest member is taken instead; "
            f"structured.testing.check({cls.__name__}) says more",
            stacklevel=_level(),
        )


# What torch.compiler.assume_constant_result does, less the import of the compiler.
_try_once._dynamo_marked_constant = True  # type: ignore[attr-defined]  # of a function


@torch.no_grad()
def _missing(key: tuple[Any, ...], statics: Sequence[Tensor]) -> str | None:
    """What an algebra has and this space has not."""
    zero: Any = zero_of(key, statics)
    generator = torch.Generator().manual_seed(0)
    A, B = (
        zero.map(lambda t: torch.randn(t.shape, dtype=t.dtype, generator=generator)).to_dense()
        for _ in range(2)
    )
    eye, norm = torch.eye(A.shape[-1], dtype=A.dtype), torch.linalg.matrix_norm
    for what, M in (("the identity is no member", eye), ("products of members are none", A @ B)):
        if norm(M - zero.orthogonal_project(M).to_dense()) > _OUTSIDE * norm(M):
            return what
    return None


def _level() -> int:
    """For a warning of the caller: that of the line which uses the package."""
    level, frame = 1, sys._getframe(1)
    while _is_ours(frame) and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    return level


def _is_ours(frame: FrameType) -> bool:
    package = frame.f_globals.get("__name__", "").partition(".")[0]
    return package in ("structured", "torch")
