"""Dense matrices: no structure at all, the reference for every other.

::

    a b c
    d e f        n^2 numbers, products O(n^3)
    g h i
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Size, Tensor

from structured._core.dispatch import sums_of_squares, symmetric_product
from structured._core.matrix import (
    Scalar,
    StructuredMatrix,
    add_to_diagonal,
    at_least_float32,
    largest,
)
from structured._products.in_place import plus_product


class Dense(StructuredMatrix):
    """Any matrix ``M``. Stores n^2 numbers; ``A X`` costs n^2 a column."""

    M: Tensor  # [..., n, n]

    dimensions = ("n n",)

    closed_under_transpose = True

    @classmethod
    def zeros(cls, n: int, *, batch_shape: Sequence[int] = (), **opts: Any) -> Self:
        """The zero matrix of size ``n``."""
        return cls(torch.zeros(*batch_shape, n, n, **opts))

    def to_dense(self) -> Tensor:
        """``M``."""
        return self.M

    @property
    def shape(self) -> Size:
        """``[..., n, n]``."""
        return self.M.shape

    @property
    def mT(self) -> Dense:
        """``M^T``."""
        return Dense(self.M.mT)

    rows_apart = True

    def apply_rows(self, X: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """By the columns that belong to either part."""
        s, M = X.shape[-2], self.M.mT
        Y, y = X.mT @ M[..., :s, :s], X.mT @ M[..., :s, s:]
        Y, y = plus_product(Y, x.mT, M[..., s:, :s]), plus_product(y, x.mT, M[..., s:, s:])
        return Y.mT, y.mT

    def matmul(self, other: Self) -> Self:
        """``M N``."""
        return self._build([self.M @ other.M])

    def orthogonal_project(self, M: Tensor) -> Self:
        """A copy of ``M``: every matrix is a member."""
        return self._build([M.clone()])

    def project(self, S: Tensor) -> Self:
        """A copy of ``S``: every matrix is a member."""
        return self._build([S.clone()])

    def project_gram(self, X: Tensor) -> Self:
        """``X X^T``, n^2 a column."""
        return self._build([symmetric_product(X)])

    def gram(self) -> Self:
        """``M^T M``."""
        return self._build([symmetric_product(self.M.mT)])

    def inverse(self) -> Self:
        """``M^{-1}``, in float32 at least.

        Raises:
            RuntimeError: If ``A`` is singular (``torch.linalg.LinAlgError``).
        """
        return self._build(
            [torch.linalg.inv(self.M.to(at_least_float32(self.dtype))).to(self.dtype)]
        )

    def solve_member(self, other: Self) -> Self:
        """``M^{-1} N``, by one factorization."""
        return self._build([self.solve(other.M)])

    def exp(self) -> Self:
        """By scaling and squaring, in float32 at least."""
        wide = self.M.to(at_least_float32(self.dtype))
        return self._build([torch.linalg.matrix_exp(wide).to(self.dtype)])

    def squared_rows(self) -> Tensor:
        """Row by row, n^2."""
        return sums_of_squares(self.M)

    def trace(self) -> Tensor:
        """``sum_i M_ii``."""
        return self.M.diagonal(dim1=-2, dim2=-1).sum(-1)

    def trace_product(self, other: Self) -> Tensor:
        """``sum_ij M_ij N_ji``, n^2."""
        return (self.M * other.M.mT).sum((-2, -1))

    def add_scaled_identity(self, alpha: Scalar) -> Self:
        """``M + alpha I``."""
        return self._build([add_to_diagonal(self.M, alpha)])

    def max_abs(self) -> Tensor:
        """Largest absolute entry."""
        return largest(self.M, self.M.ndim - 2)
