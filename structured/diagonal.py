"""Diagonal matrices. To add a structure, copy this file.

::

    a . .
    . b .        n numbers, products O(n)
    . . c
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Size, Tensor

from structured._core.checks import check_pivots
from structured._core.dispatch import sums_of_squares
from structured._core.matrix import Scalar, StructuredMatrix, largest, trailing
from structured._products.in_place import holds_product, plain


class Diagonal(StructuredMatrix):
    """``diag(d_1, ..., d_n)``. Stores n numbers; ``A X`` costs n a column."""

    d: Tensor  # [..., n]

    dimensions = ("n",)

    closed_under_transpose = True

    @classmethod
    def zeros(cls, n: int, *, batch_shape: Sequence[int] = (), **opts: Any) -> Self:
        """The zero matrix of size ``n``."""
        return cls(torch.zeros(*batch_shape, n, **opts))

    def to_dense(self) -> Tensor:
        """``diag(d)``."""
        return torch.diag_embed(self.d)

    @property
    def shape(self) -> Size:
        """``[..., n, n]``."""
        return Size((*self.d.shape, self.d.shape[-1]))

    @property
    def mT(self) -> Diagonal:
        """A diagonal matrix is its own transpose."""
        return self

    def matmul(self, other: Self) -> Self:
        """``diag(d e)``."""
        return self._build([self.d * other.d])

    def apply(self, X: Tensor) -> Tensor:
        """Scale the rows of ``X [..., n, m]``."""
        return self.d[..., None] * X

    def apply_overwriting(self, X: Tensor) -> Tensor:
        """Row by row, in place."""
        in_place = plain(X, self.d) and holds_product(X, self.batch_shape)
        return X.mul_(self.d[..., None]) if in_place else self.apply(X)

    rows_apart = True

    def apply_rows(self, X: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Row by row."""
        d, s = self.d[..., None], X.shape[-2]
        return d[..., :s, :] * X, d[..., s:, :] * x

    def apply_transpose(self, X: Tensor) -> Tensor:
        """The same as :meth:`apply`."""
        return self.d[..., None] * X

    def orthogonal_project(self, M: Tensor) -> Self:
        """The diagonal of ``M [..., n, n]``."""
        return self._build([M.diagonal(dim1=-2, dim2=-1).clone()])

    def project(self, S: Tensor) -> Self:
        """The diagonal of ``S [..., n, n]``."""
        return self.orthogonal_project(S)

    def project_gram(self, X: Tensor) -> Self:
        """Sums of squares along the rows of ``X [..., n, m]``."""
        return self._build([sums_of_squares(X)])

    def gram(self) -> Self:
        """``diag(d^2)``."""
        return self._build([self.d * self.d])

    def exp(self) -> Self:
        """``diag(exp(d))``."""
        return self._build([self.d.exp()])

    def diagonal(self) -> Tensor:
        """``d``."""
        return self.d.clone()

    def squared_rows(self) -> Tensor:
        """``d^2``."""
        return self.d.square()

    def trace(self) -> Tensor:
        """Sum of ``d``."""
        return self.d.sum(-1)

    def trace_product(self, other: Self) -> Tensor:
        """``sum_i d_i e_i``."""
        return (self.d * other.d).sum(-1)

    def add_scaled_identity(self, alpha: Scalar) -> Self:
        """``diag(d + alpha)``."""
        alpha = trailing(alpha, self.d) if isinstance(alpha, Tensor) else alpha
        return self._build([(self.d + alpha).to(self.d.dtype)])

    def solve(self, X: Tensor) -> Tensor:
        """Divide the rows of ``X [..., n, m]``.

        Raises:
            RuntimeError: If ``A`` is singular (``torch.linalg.LinAlgError``).
        """
        check_pivots(self.d)
        return X / self.d[..., None]

    def inverse(self) -> Self:
        """``diag(1 / d)``.

        Raises:
            RuntimeError: If ``A`` is singular (``torch.linalg.LinAlgError``).
        """
        check_pivots(self.d)
        return self._build([1 / self.d])

    def logdet(self) -> Tensor:
        """Sum of ``log |d|``."""
        return self.d.abs().log().sum(-1)

    def max_abs(self) -> Tensor:
        """Largest absolute entry."""
        return largest(self.d, self.d.ndim - 1)

    def spectral_norm(self) -> Tensor:
        """As :meth:`max_abs`."""
        return self.max_abs()

    def frobenius_norm(self) -> Tensor:
        """Euclidean norm of ``d``."""
        return torch.linalg.vector_norm(self.d, dim=-1)
