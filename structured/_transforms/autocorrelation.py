"""Autocorrelation of columns: sums along the diagonals of ``X X^T`` without forming it.

The power spectrum, summed over the columns, is that of the sums. Up to some thousand rows two
products take less than an FFT. With rows ``j = q j1 + j2``, padded with zeros to ``L = p q = 2 n``,
and ``k = c + p k2``,

    F_k = sum_j2 exp(-2 pi i k j2 / L) U_c,j2,      U_c,j2 = sum_j1 exp(-2 pi i c j1 / p) X_j.

As ``X`` is real, ``c`` up to ``p / 2`` is enough. Costs n (p + 4 q) a column; cyclic, half.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from structured._core.dispatch import sums_of_squares
from structured._core.numbers import at_least_float32, tabulated
from structured._transforms.fft import factors, fft_length, irfft, rfft

_LARGEST = (256, 16)  # p and q: up to here products are faster than FFTs (measured),
_FEWEST = 128  # if there are so many columns
_COLUMNS = 256  # transformed at a time, so that their spectrum stays in the cache (measured)


def autocorrelation(X: Tensor, *, cyclic: bool = False) -> Tensor:
    """``sum_i <x_i, x_{i+k}>``, ``[..., n]``, of rows of ``X [..., n, m]``; float32 at least.

    ``cyclic``: the row after the last is the first, and ``L = n``.
    """
    (n, m), X = X.shape[-2:], X.to(at_least_float32(X.dtype))
    rows, q = factors(n, _LARGEST[1])
    p = rows if cyclic else 2 * rows
    if not X.is_cpu or m < _FEWEST or not 0 < p <= _LARGEST[0]:
        return _by_fft(X, n if cyclic else fft_length(n))
    waves, turns, place = _tables(p, q, rows, dtype=X.dtype)
    powers = [_power(waves, turns, columns) for columns in X.split(_COLUMNS, -1)]
    return irfft(torch.stack(powers).sum(0).index_select(-1, place), p * q)[..., :n]


def _power(waves: Tensor, turns: Tensor, X: Tensor) -> Tensor:
    """``|F_k|^2``, summed over the columns, for all ``k`` by ``c``, ``[..., c q]``."""
    (*batch, n, m), rows = X.shape, waves.shape[-1]
    U = waves @ X.reshape(*batch, rows, n // rows * m)
    F = turns @ U.reshape(*batch, *turns.shape[:-1], m)
    return sums_of_squares(F).unflatten(-1, (-1, 2)).sum(-1).flatten(-2)


@tabulated
def _tables(p: int, q: int, rows: int) -> tuple[np.ndarray, ...]:
    """Of both products, ``[2 c, rows]`` and ``[c, 2 q, 2 q]``; where each ``k`` is."""
    c, length = np.arange(p // 2 + 1), p * q
    angles = np.outer(c, np.arange(rows)) % p * (2 * math.pi / p)
    waves = np.stack([np.cos(angles), -np.sin(angles)], 1).reshape(-1, rows)
    k = c[:, None] + p * np.arange(q)
    angles = (k[..., None] * np.arange(q) % length) * (2 * math.pi / length)  # [c, k2, j2]
    cos, sin = np.cos(angles), np.sin(angles)
    turns = np.stack([np.concatenate([cos, sin], -1), np.concatenate([-sin, cos], -1)], -2)
    place = np.empty(length, dtype=np.int64)
    place[-k.ravel() % length] = place[k.ravel()] = np.arange(k.size)
    return waves, turns.reshape(-1, 2 * q, 2 * q), place[: length // 2 + 1]


def _by_fft(X: Tensor, length: int) -> Tensor:
    """:func:`autocorrelation`, n log n a column."""
    F = rfft(X.mT, length)
    return irfft(torch.linalg.vecdot(F, F, dim=-2), length)[..., : X.shape[-2]]


def diagonal_sums(M: Tensor) -> Tensor:
    """Sums of the n lower diagonals of ``M [..., n, n]``, in float32 at least.

    Read in rows of ``n + 1`` numbers, every row slides one place further: diagonals become columns.
    """
    n, wide = M.shape[-1], at_least_float32(M.dtype)
    main = M.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True, dtype=wide)
    if n < 2:
        return main[..., :n]
    slid = M.tril(-1).flatten(-2)[..., :-1].unflatten(-1, (n - 1, n + 1))
    return torch.cat([main, slid.sum(-2, dtype=wide)[..., 2:].flip(-1)], -1)
