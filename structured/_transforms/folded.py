"""Triangles of small matrices in their rectangles, and back, by one table of places.

Views, masks and joints of blocks cost more than the arithmetic up to some hundred rows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from structured._core.numbers import tabulated

SMALL = 64  # rows; up to here tables are faster on a CPU, whatever the columns (measured)


def unfold(R: Tensor, n: int) -> Tensor:
    """The lower triangular matrix ``[..., n, n]`` of a rectangle."""
    places, above, _, _ = _tables(n, dtype=torch.float32)
    return R.flatten(-2).index_select(-1, places).masked_fill(above, 0).unflatten(-1, (n, n))


def fold(M: Tensor) -> Tensor:
    """The rectangle of the lower triangle of ``M [..., n, n]``."""
    n = M.shape[-1]
    _, _, places, _ = _tables(n, dtype=torch.float32)
    return M.flatten(-2).index_select(-1, places).unflatten(-1, (n + 1 - n % 2, (n + 1) // 2))


def fold_twice(S: Tensor) -> Tensor:
    """That of a symmetric matrix, doubled off the diagonal."""
    R, n = fold(S), S.shape[-1]
    _, _, _, diagonal = _tables(n, dtype=torch.float32)
    return R + R.masked_fill(diagonal, 0)


@tabulated
def _tables(n: int) -> tuple[np.ndarray, ...]:
    """Where each entry is in the rectangle, and which have no place; and the other way about."""
    shift, h = 1 - n % 2, (n + 1) // 2
    i, j = np.divmod(np.arange(n * n), max(n, 1))
    first = (i + shift) * h + j  # of L1 and B, as they stand
    last = (j - h) * h + i - h + h - (n - h)  # of L2, transposed
    of_entries = np.where(j < h, first, last)
    above = i < j
    of_places = np.zeros((n + shift) * h, dtype=np.int64)
    of_places[of_entries[~above]] = np.arange(n * n)[~above]
    row, column = np.divmod(of_places, max(n, 1))
    diagonal = (row == column).reshape(n + shift, h)
    return np.where(above, 0, of_entries), above, of_places, diagonal
