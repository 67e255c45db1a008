"""Checks of options: each raises ``ValueError`` that says what was expected and what is there."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor

from singd.ops.storage import FORMS
from structured import Structure, StructureLike, parse

SMALL = 16
"""Rows of blocks, by default, where the matrix is thinner."""

MAX_DIM = 8192
"""Width beyond which a factor is diagonal by default."""


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


def stored_as(name: str, values: Any) -> None:
    """Raise unless ``values`` are a pair of real data types, names of forms, or ``None``."""
    pair(name, values)
    for value in values:
        is_real = isinstance(value, torch.dtype) and value.is_floating_point
        if not (value is None or is_real or (isinstance(value, str) and value in FORMS)):
            known = ", ".join(map(repr, FORMS))
            raise ValueError(
                f"{name}: expected a floating-point dtype, {known} or None, got {value!r}"
            )


def forms_of(given: Sequence[torch.dtype | str | None], names: Iterable[str]) -> dict[str, str]:
    """The forms of members with those names, of K and C and of their momenta."""
    of_side = dict(zip("KC", given, strict=True))
    forms = {name: of_side.get(name.removeprefix("m_")) for name in names}
    return {name: form for name, form in forms.items() if isinstance(form, str)}


def working_dtype(given: torch.dtype | str | None, dtype: torch.dtype) -> torch.dtype:
    """The data type of factors of a weight: float32 of those that are stored in another form."""
    return torch.float32 if isinstance(given, str) else given or dtype


def wide(like: Mapping[str, Any], inner: Iterable[int] = ()) -> dict[str, Any]:
    """What :meth:`Method.init` is given by name, in float32 at least.

    Args:
        like: ``batch_shape``, unless it is ``()``, ``dtype`` and ``device``.
        inner: Batch dimensions of the matrix itself, which come last.
    """
    batch_shape = (*like.get("batch_shape", ()), *inner)
    dtype = torch.promote_types(like["dtype"], torch.float32)
    return {**like, "batch_shape": batch_shape, "dtype": dtype}


def structure_pairs(given: Any) -> list[Any]:
    """The pairs in the option ``structures``: one, those of a mapping, or none."""
    pairs = list(given.values()) if isinstance(given, Mapping) else [given]
    pairs = [each for each in pairs if each is not None]
    for each in pairs:
        pair("structures", each)
    return pairs


def warn_of_limits(max_dim: Any, wide_structure: Any) -> None:
    """A ``DeprecationWarning`` that says what to write, on the line that made the optimizer."""
    if max_dim is not None or wide_structure is not None:
        limit = MAX_DIM if max_dim is None or isinstance(max_dim, Mapping) else max_dim
        spec = f"up_to({limit}, dense, {parse(wide_structure or 'diagonal')})"
        message = f"max_dim, wide_structure: write structures, such as {spec!r}, instead"
        warnings.warn(message, DeprecationWarning, stacklevel=3)


# Of one matrix -----------------------------------------------------------------------------------


def by_name(given: Any, name: str) -> Any:
    """An option; or, of a mapping from patterns, what the first pattern gives that matches.

    ``None`` if none does.
    """
    if not isinstance(given, Mapping):
        return given
    return next((value for pattern, value in given.items() if fnmatch(name, pattern)), None)


def default_structures(shape: Sequence[int]) -> tuple[str, str]:
    """Dense on the smaller side of ``(..., d_out, d_in)``, blocks of that size on the other.

    Each factor then has at most as many numbers as the matrix. Where that side has less than
    ``SMALL``, blocks are up to twice its size, and of ``SMALL`` rows where the matrix is one of
    many small ones, as in a depthwise convolution. Sides beyond ``MAX_DIM`` are diagonal.
    """
    *batch, d_out, d_in = shape
    smaller = min(d_out, d_in)
    size = max(smaller, SMALL if batch else min(SMALL, 2 * smaller), 1)

    def of_side(n: int) -> str:
        if n > MAX_DIM:
            return "diagonal"
        return "dense" if n <= size else f"block_diagonal({size})"

    return of_side(d_in), of_side(d_out)


def within_limit(spec: StructureLike, n: int, name: str, options: Mapping[str, Any]) -> Structure:
    """The structure of a side of ``n``, or ``wide_structure`` beyond ``max_dim`` if that is set."""
    limit, wide = by_name(options["max_dim"], name), options["wide_structure"]
    if limit is None and wide is not None:
        limit = MAX_DIM
    return parse((wide or "diagonal") if limit is not None and n > limit else spec).at(n)


def graft_of(options: Mapping[str, Any]) -> str | None:
    """Whose length directions have.

    ``"auto"`` is ``"running"``, unless ``kl_clip`` bounds them; without a momentum there are no
    steps that it averages, and ``"running"`` is ``"rms"``.
    """
    graft: str | None = options["graft"]
    if graft == "auto":
        graft = "running" if options["kl_clip"] is None else None
    return "rms" if graft == "running" and not options["momentum"] else graft


def lr_cov(options: Mapping[str, Any], step: int) -> Any:
    """``beta_1`` at this step; by default 0.03 T, at most 0.3.

    So factors remember about as many steps whatever T is: at T = 1 an update of 0.3 would fit them
    to the gradient of the very batch that they precondition. A burn-in is for getting far, and
    takes the same number though it updates in every step.
    """
    given = options["lr_cov"]
    if given is None:
        return min(0.3, 0.03 * options["T"])
    return given(step) if callable(given) else given
