"""Symmetric matrices as the n (n + 1) / 2 numbers of a triangle, in one rectangle.

::

    a b c d        h i
    b e f g        a j
    c f h i        b e
    d g i j        c f
                   d g

Rectangular full packed format (Gustavson et al., ACM TOMS 37(2), 2010), as of
:class:`structured.LowerTriangular`: blocks are copied, and no table of places is needed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from structured._products.in_place import plain

_TILE = 256


def pack_symmetric(S: Tensor) -> Tensor:
    """The n (n + 1) / 2 numbers of a symmetric matrix, a new tensor; n^2 numbers are moved.

    Args:
        S: Symmetric matrices ``[..., n, n]``; of those that are so but for rounding, one half.

    Returns:
        ``[..., n + 1 - n % 2, (n + 1) // 2]``.

    Raises:
        ValueError: If ``S`` is not square.
    """
    if S.ndim < 2 or S.shape[-1] != S.shape[-2]:
        raise ValueError(f"pack_symmetric: expected square matrices, got {list(S.shape)}")
    *batch, n, _ = S.shape
    h, shift = (n + 1) // 2, 1 - n % 2
    R = S.new_empty(*batch, n + shift, h)
    R[..., shift:, :] = S[..., :, :h]
    corner = R[..., : n - h, h - (n - h) :]
    above, last = _above(n - h, S.device), S[..., h:, h:]
    if plain(S):
        torch.where(above, last, corner, out=corner)
    else:
        corner.copy_(torch.where(above, last, corner))
    return R


def unpack_symmetric(R: Tensor, out: Tensor | None = None) -> Tensor:
    """The symmetric matrix ``[..., n, n]`` of which :func:`pack_symmetric` made ``R``.

    Args:
        R: Numbers ``[..., n + 1 - n % 2, (n + 1) // 2]``.
        out: Tensor ``[..., n, n]`` that is written to; a new one if ``None``.

    Raises:
        ValueError: If ``R`` is no such rectangle.
    """
    *batch, rows, h = R.shape if R.ndim > 1 else (0, 0)
    n = min(rows, 2 * h)
    if rows != n + 1 - n % 2 or h != (n + 1) // 2:
        raise ValueError(
            f"unpack_symmetric: expected [..., n + 1 - n % 2, (n + 1) // 2], got {list(R.shape)}"
        )
    S = R.new_empty(*batch, n, n) if out is None else out
    shift = 1 - n % 2
    first, below = R[..., shift : shift + h, :], R[..., shift + h :, :]
    corner = R[..., : n - h, h - (n - h) :]
    S[..., h:, :h] = below
    for i, j in _tiles(n - h, h, R):
        S[..., j, h + i.start : h + i.stop] = below[..., i, j].mT
    _reflect(S[..., :h, :h], first)
    _reflect(S[..., h:, h:].mT, corner.mT)
    return S


def _reflect(S: Tensor, L: Tensor) -> None:
    """Write the symmetric matrix with the lower triangle of ``L``; above it anything may stand."""
    n = S.shape[-1]
    for rows, columns in _tiles(n, n, L):
        block = L[..., rows, columns]
        if rows == columns:
            S[..., rows, rows] = torch.where(_above(block.shape[-1], L.device), block.mT, block)
        elif rows.start > columns.start:
            S[..., rows, columns] = block
            S[..., columns, rows] = block.mT


def _tiles(rows: int, columns: int, like: Tensor) -> Iterator[tuple[slice, slice]]:
    """Parts of a matrix; on a CPU those whose transposes are read from its caches."""
    tile = _TILE if like.is_cpu else max(rows, columns, 1)
    for i in range(0, rows, tile):
        for j in range(0, columns, tile):
            yield slice(i, min(i + tile, rows)), slice(j, min(j + tile, columns))


def _above(n: int, device: torch.device) -> Tensor:
    """Where ``i <= j``."""
    places = torch.arange(n, device=device)
    return places[:, None] <= places
