"""Kronecker products of tensors, and products with them factor by factor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import reduce

from torch import Tensor


def kron(matrices: Iterable[Tensor]) -> Tensor:
    """``M_1 (x) ... (x) M_k`` of ``[..., n_i, n_i]``; batch dimensions broadcast."""

    def product(A: Tensor, C: Tensor) -> Tensor:
        M = A[..., :, None, :, None] * C[..., None, :, None, :]
        return M.flatten(-4, -3).flatten(-2)

    return reduce(product, matrices)


def kron_vectors(vectors: Iterable[Tensor]) -> Tensor:
    """``v_1 (x) ... (x) v_k`` of ``[..., n_i]``; batch dimensions broadcast."""
    return reduce(lambda a, b: (a[..., :, None] * b[..., None, :]).flatten(-2), vectors)


def one_by_one(
    X: Tensor, sizes: Sequence[int], functions: Sequence[Callable[[Tensor], Tensor]]
) -> Tensor:
    """``(f_1 (x) ... (x) f_k) X`` for linear functions of columns.

    Args:
        X: ``[..., n, m]``, ``n`` the product of the sizes.
        sizes: ``n_1, ..., n_k``.
        functions: ``f_i`` takes ``[..., n_i, m n / n_i]``.
    """
    m = X.shape[-1]
    for i in reversed(range(len(sizes))):
        # rows (others, n_i) -> n_i in front; after a full round all are in their places
        others = math.prod(sizes[:i]) * math.prod(sizes[i + 1 :])
        X = X.unflatten(-2, (others, sizes[i])).movedim(-2, -3).flatten(-2)
        X = functions[i](X).unflatten(-1, (others, m)).flatten(-3, -2)
    return X
