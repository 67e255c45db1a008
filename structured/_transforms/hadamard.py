"""The orthonormal Hadamard transform, by small products."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from structured._core.numbers import tabulated

_LARGEST = 32  # of the small products that a Hadamard matrix falls into


def _signs(device: torch.device | str) -> Tensor:
    """``(-1)^|i & j|``, a Hadamard matrix, made on its device: to copy it there would wait."""
    i = torch.arange(_LARGEST, device=device)
    common = i[:, None] & i
    for shift in (4, 2, 1):  # the parity of its digits
        common = common ^ common >> shift
    return 1.0 - 2.0 * (common & 1)


@tabulated
def _sylvester_matrix(size: int) -> tuple[np.ndarray, ...]:
    """The same on the CPU."""
    i = range(size)
    return (np.array([[1.0 - 2 * ((a & b).bit_count() % 2) for b in i] for a in i]),)


def hadamard(X: Tensor) -> Tensor:
    """``H X`` for ``X [..., n, m]``, ``H`` the symmetric orthonormal Hadamard matrix (Sylvester).

    For other sizes than powers of two, ``H`` has one diagonal block for each binary digit of n, the
    largest first (13 = 8 + 4 + 1). Costs n log n a column.
    """
    n = X.shape[-2]
    sizes = [1 << i for i in reversed(range(n.bit_length())) if n >> i & 1]
    parts = [_sylvester(part) for part in X.split(sizes, -2)] if sizes else [X]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


def _sylvester(X: Tensor) -> Tensor:
    """``H X`` for ``X [..., 2^p, m]``: ``H`` is a Kronecker product of matrices up to 32 x 32."""
    n, m = X.shape[-2:]
    H = _sylvester_matrix(_LARGEST, dtype=X.dtype)[0] if X.is_cpu else _signs(X.device).to(X.dtype)
    done, scale = 1, 1 / math.sqrt(n)
    while done < n:
        k = min(_LARGEST, n // done)
        # one product for the leading places of k rows, then the places within
        X = (scale * H[:k, :k]) @ X.reshape(*X.shape[:-2], done, k, -1)
        X, done, scale = X.reshape(*X.shape[:-3], n, m), done * k, 1.0
    return X
