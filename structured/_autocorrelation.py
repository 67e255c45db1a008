"""Autocorrelation of columns: sums along the diagonals of ``X X^T`` without forming it.

The power spectrum, summed over the columns, is that of the sums. Up to some thousand rows two
products take less than an FFT. With rows ``j = q j1 + j2``, padded with zeros to ``L = p q = 2 n``,
and ``k = c + p k2``,

    F_k = sum_j2 exp(-2 pi i k j2 / L) U_c,j2,      U_c,j2 = sum_j1 exp(-2 pi i c j1 / p) X_j.

As ``X`` is real, ``c`` up to ``p / 2`` is enough. Costs n (p + 4 q) a column.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from structured._dispatch import sums_of_squares
from structured._fft import fft_length, irfft, rfft
from structured._numbers import at_least_float32, tabulated

_LARGEST = (256, 16)  # p and q: up to here products are faster than FFTs (measured),
_FEWEST = 128  # if there are so many columns
_COLUMNS = 256  # transformed at a time, so that their spectrum stays in the cache (measured)


def autocorrelation(X: Tensor) -> Tensor:
    """``sum_i <x_i, x_{i+k}>``, ``[..., n]``, of rows of ``X [..., n, m]``; float32 at least."""
    (n, m), X = X.shape[-2:], X.to(at_least_float32(X.dtype))
    q = next(q for q in range(_LARGEST[1], 0, -1) if n % q == 0)
    p = len(range(2 * n // q))  # an int also where torch.compile has a symbol for n
    if not X.is_cpu or m < _FEWEST or not 0 < p <= _LARGEST[0]:
        return _by_fft(X)
    waves, turns, place = _tables(p, q, dtype=X.dtype)
    powers = [_power(waves, turns, columns) for columns in X.split(_COLUMNS, -1)]
    power = torch.stack(powers).sum(0)
    return irfft(power.index_select(-1, place), 2 * n)[..., :n]


def _power(waves: Tensor, turns: Tensor, X: Tensor) -> Tensor:
    """``|F_k|^2``, summed over the columns, for all ``k`` by ``c``, ``[..., (p / 2 + 1) q]``."""
    (*batch, n, m), half = X.shape, waves.shape[-1]
    U = waves @ X.reshape(*batch, half, n // half * m)
    F = turns @ U.reshape(*batch, *turns.shape[:-1], m)
    return sums_of_squares(F).unflatten(-1, (-1, 2)).sum(-1).flatten(-2)


@tabulated
def _tables(p: int, q: int) -> tuple[np.ndarray, ...]:
    """Of both products, ``[p + 2, p / 2]`` and ``[p / 2 + 1, 2 q, 2 q]``; where each ``k`` is."""
    c, length = np.arange(p // 2 + 1), p * q
    angles = np.outer(c, np.arange(p // 2)) % p * (2 * math.pi / p)
    waves = np.stack([np.cos(angles), -np.sin(angles)], 1).reshape(p + 2, p // 2)
    k = c[:, None] + p * np.arange(q)
    angles = (k[..., None] * np.arange(q) % length) * (2 * math.pi / length)  # [c, k2, j2]
    cos, sin = np.cos(angles), np.sin(angles)
    turns = np.stack([np.concatenate([cos, sin], -1), np.concatenate([-sin, cos], -1)], -2)
    place = np.empty(length, dtype=np.int64)
    place[-k.ravel() % length] = place[k.ravel()] = np.arange(k.size)
    return waves, turns.reshape(p // 2 + 1, 2 * q, 2 * q), place[: length // 2 + 1]


def _by_fft(X: Tensor) -> Tensor:
    """:func:`autocorrelation`, n log n a column."""
    n, length = X.shape[-2], fft_length(X.shape[-2])
    F = rfft(X.mT, length)
    return irfft((F.real.square() + F.imag.square()).sum(-2), length)[..., :n]
