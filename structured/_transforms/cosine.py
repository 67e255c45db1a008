"""The orthonormal cosine transform (DCT-II): ``Y_k = w_k sum_j cos(pi k (2 j + 1) / 2n) X_j``.

An FFT runs along rows, so that ``X`` has to be transposed, there and back. For ``n = p q`` with
small ``p`` and ``q``, two products take less. With ``j = q j1 + j2``, ``b = pi k (2 j2 + 1) / 2n``,

    Y_k = w_k sum_j2 (cos(b) U_k,j2 - sin(b) V_k,j2),
    U_k,j2 = sum_j1 cos(pi k j1 / p) X_j,      V_k,j2 = sum_j1 sin(pi k j1 / p) X_j.

``U`` and ``V`` only depend on ``k mod 2p``, up to the sign of ``V`` on ``|k mod 2p|``: there are p
groups of q places ``k``. Costs 2 n (p + q) a column.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from structured._core.numbers import tabulated
from structured._transforms.fft import factors, irfft, rfft

_LARGEST = (64, 32)  # p and q: up to here products are faster than FFTs (measured)


def cosine(X: Tensor) -> Tensor:
    """``C X`` for ``X [..., n, m]``, not empty, in float32 or float64."""
    n, m = X.shape[-2:]
    p, q = factors(n, _LARGEST[1])
    if not _by_product(p, X):
        return by_fft(X)
    waves, turns, _, place = _tables(p, q, dtype=X.dtype)
    F = waves @ X.reshape(*X.shape[:-2], p, q * m)
    Y = turns @ F.reshape(*X.shape[:-2], p, 2 * q, m)
    return Y.flatten(-3, -2).index_select(-2, place)


def inverse_cosine(Z: Tensor) -> Tensor:
    """``C^T Z``, the inverse of :func:`cosine`."""
    n, m = Z.shape[-2:]
    p, q = factors(n, _LARGEST[1])
    if not _by_product(p, Z):
        return inverse_by_fft(Z)
    waves, turns, order, _ = _tables(p, q, dtype=Z.dtype)
    F = turns.mT @ Z.index_select(-2, order).unflatten(-2, (p, q))
    X = waves.mT @ F.reshape(*Z.shape[:-2], 2 * p, q * m)
    return X.reshape(Z.shape)


def _by_product(p: int, X: Tensor) -> bool:
    """A GPU transposes fast."""
    return X.is_cpu and p <= _LARGEST[0]


@tabulated
def _tables(p: int, q: int) -> tuple[np.ndarray, ...]:
    """Of both products, ``[2p, p]`` and ``[p, q, 2q]``; ``k`` by groups, and its inverse, ``[n]``.

    Group 0 holds the multiples of p: ``V`` is zero there, and in its place stands ``U_p``.
    """
    n = p * q
    residues = (np.arange(n) + p) % (2 * p) - p
    order = np.argsort(np.abs(residues) % p, kind="stable")
    residues = residues[order]
    angles = np.outer(order, 2 * np.arange(q) + 1) % (4 * n) * (math.pi / (2 * n))
    norms = np.sqrt(np.where(order > 0, 2, 1) / n)[:, None]
    turns = np.stack([np.cos(angles), -np.sign(residues)[:, None] * np.sin(angles)], 1)
    turns[residues == 0, 1] = 0
    turns[residues == -p] = turns[residues == -p, ::-1] * [[0], [1]]
    angles = np.outer(np.arange(p), np.arange(p)) % (2 * p) * (math.pi / p)
    waves = np.stack([np.cos(angles), np.sin(angles)], 1)
    waves[0, 1] = (-1.0) ** np.arange(p)
    return (
        waves.reshape(2 * p, p),
        (norms[:, None] * turns).reshape(p, q, 2 * q),
        order,
        np.argsort(order),
    )


def by_fft(X: Tensor) -> Tensor:
    """:func:`cosine` by a real FFT of length n a column.

    Source: Makhoul, IEEE Trans. ASSP 28(1), 1980: even places, then odd ones backwards. The real
    parts of the twisted spectrum are the first half of the transform, the imaginary the last.
    """
    n, rows = X.shape[-2], X.mT
    F = rfft(torch.cat([rows[..., ::2], rows[..., 1::2].flip(-1)], -1), n) * _twist(n, X)
    return torch.cat([F.real, -F.imag[..., 1 : (n + 1) // 2].flip(-1)], -1).mT


def inverse_by_fft(Z: Tensor) -> Tensor:
    """:func:`inverse_cosine`, likewise."""
    n, rows = Z.shape[-2], Z.mT
    mirrored = torch.nn.functional.pad(rows.flip(-1)[..., : n // 2], (1, 0))
    F = torch.complex(rows[..., : n // 2 + 1], -mirrored) / _twist(n, Z)
    v = irfft(F, n)
    evens, odds = v[..., : (n + 1) // 2], v[..., (n + 1) // 2 :].flip(-1)
    odds = torch.nn.functional.pad(odds, (0, n % 2))
    return torch.stack([evens, odds], -1).flatten(-2)[..., :n].mT


def _twist(n: int, like: Tensor) -> Tensor:
    """``w_k exp(-i pi k / 2n)`` that make the DCT-II orthonormal, ``[n // 2 + 1]``."""
    places = torch.arange(n // 2 + 1, dtype=like.dtype, device=like.device)
    norms = torch.full_like(places, math.sqrt(2 / max(n, 1)))
    norms[:1] /= math.sqrt(2)
    return torch.polar(norms, places * (-math.pi / (2 * max(n, 1))))
