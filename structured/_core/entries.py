"""Entries of an operator, ``A[..., i, j]``, by products with unit vectors."""

from __future__ import annotations

from operator import index as integer
from typing import Any

import torch
from torch import Tensor

Place = int | slice


def places(index: Any, ndim: int) -> list[Place] | None:
    """One integer or slice for each dimension; ``None`` where there are other indices.

    Raises:
        IndexError: If there are more than ``ndim``.
    """
    given = index if isinstance(index, tuple) else (index,)
    if any(isinstance(each, bool) for each in given):
        return None
    dots = [k for k, each in enumerate(given) if each is Ellipsis]
    if len(given) - len(dots) > ndim or len(dots) > 1:
        raise IndexError(f"expected at most {ndim} indices and one ellipsis, got {len(given)}")
    cut = dots[0] if dots else len(given)
    missing = [slice(None)] * (ndim - len(given) + len(dots))
    full = [*given[:cut], *missing, *given[cut + 1 :]]
    whole = [each if isinstance(each, slice) else _integer(each) for each in full]
    return None if None in whole else whole  # type: ignore[return-value]  # None was looked for


def entries(A: Any, where: list[Place]) -> Tensor:
    """``A.to_dense()[where]``, by a product with as few unit vectors as rows or columns need.

    Raises:
        IndexError: If an index is out of range.
    """
    *batch, i, j = where
    rows, columns = (range(A.n)[_as_slice(place, A.n)] for place in (i, j))
    if len(columns) <= len(rows):
        found = A.apply(_units(A, columns))
        return found[(*batch, i, slice(None) if isinstance(j, slice) else 0)]
    found = A.apply_transpose(_units(A, rows)).mT
    return found[(*batch, slice(None) if isinstance(i, slice) else 0, j)]


def _integer(value: Any) -> int | None:
    if isinstance(value, Tensor):  # one without dimensions is an index of its own kind
        return None
    try:
        return integer(value)
    except TypeError:
        return None


def _as_slice(place: Place, n: int) -> slice:
    if isinstance(place, slice):
        return place
    if not -n <= place < n:
        raise IndexError(f"expected an index from {-n} to {n - 1}, got {place}")
    return slice(place % n, place % n + 1)


def _units(A: Any, which: range) -> Tensor:
    """Columns of the identity, ``[n, m]``."""
    units = torch.zeros(A.n, len(which), dtype=A.dtype, device=A.device)
    places = torch.arange(which.start, which.stop, which.step, device=A.device)
    units[places, torch.arange(len(which), device=A.device)] = 1
    return units
