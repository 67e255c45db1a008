"""Multiples of the identity: the smallest structure.

::

    c . .
    . c .        1 number, products O(1)
    . . c
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Size, Tensor

from structured._core.checks import check_pivots
from structured._core.matrix import Scalar, StructuredMatrix, at_least_float32, static


class ScaledIdentity(StructuredMatrix):
    """``c I``. Stores one number; ``A X`` costs n a column."""

    c: Tensor  # [...]
    size: int = static()  # n

    dimensions = ("",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.size, bool) or not self.size >= 0:
            raise ValueError(f"ScaledIdentity: expected a size >= 0, got {self.size!r}")

    closed_under_transpose = True

    @classmethod
    def zeros(cls, n: int, *, batch_shape: Sequence[int] = (), **opts: Any) -> Self:
        """The zero matrix of size ``n``."""
        return cls(torch.zeros(tuple(batch_shape), **opts), n)

    def to_dense(self) -> Tensor:
        """``diag(c, ..., c)``."""
        return torch.diag_embed(self.c[..., None].expand(*self.c.shape, self.size))

    @property
    def shape(self) -> Size:
        """``[..., n, n]``."""
        return Size((*self.c.shape, self.size, self.size))

    @property
    def mT(self) -> ScaledIdentity:
        """A multiple of the identity is its own transpose."""
        return self

    def matmul(self, other: Self) -> Self:
        """``c e I``."""
        return self._build([self.c * other.c])

    def apply(self, X: Tensor) -> Tensor:
        """``c X``."""
        return self.c[..., None, None] * X

    def apply_transpose(self, X: Tensor) -> Tensor:
        """``c X``."""
        return self.apply(X)

    def orthogonal_project(self, M: Tensor) -> Self:
        """Mean of the diagonal of ``M [..., n, n]``; zero for ``n = 0``."""
        return self._mean(M.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=at_least_float32(M.dtype)))

    def project(self, S: Tensor) -> Self:
        """Mean of the diagonal of ``S [..., n, n]``."""
        return self.orthogonal_project(S)

    def project_gram(self, X: Tensor) -> Self:
        """Sum of squares over n, one pass over ``X [..., n, m]``."""
        wide = at_least_float32(X.dtype)
        return self._mean(torch.linalg.vector_norm(X, dim=(-2, -1), dtype=wide).square())

    def _mean(self, trace: Tensor) -> Self:
        """The member of the given trace."""
        return self._build([(trace / max(self.size, 1)).to(self.dtype)])

    def gram(self) -> Self:
        """``c^2 I``."""
        return self._build([self.c * self.c])

    def exp(self) -> Self:
        """``exp(c) I``."""
        return self._build([self.c.exp()])

    def diagonal(self) -> Tensor:
        """``c``, n times."""
        return self.c[..., None].repeat(*[1] * self.c.ndim, self.size)

    def trace(self) -> Tensor:
        """``n c``."""
        return self.size * self.c

    def add_scaled_identity(self, alpha: Scalar) -> Self:
        """``(c + alpha) I``."""
        return self._build([(self.c + alpha).to(self.c.dtype)])

    def solve(self, X: Tensor) -> Tensor:
        """``X / c``.

        Raises:
            RuntimeError: If ``A`` is singular (``torch.linalg.LinAlgError``).
        """
        self._check_pivots()
        return X / self.c[..., None, None]

    def inverse(self) -> Self:
        """``I / c``.

        Raises:
            RuntimeError: If ``A`` is singular (``torch.linalg.LinAlgError``).
        """
        self._check_pivots()
        return self._build([1 / self.c if self.size else self.c.clone()])

    def _check_pivots(self) -> None:
        if self.size:
            check_pivots(self.c[..., None])

    def logdet(self) -> Tensor:
        """``n log |c|``."""
        return self.size * self.c.abs().log() if self.size else torch.zeros_like(self.c)

    def max_abs(self) -> Tensor:
        """``|c|``; zero for ``n = 0``."""
        return self.c.abs() if self.size else torch.zeros_like(self.c)

    def spectral_norm(self) -> Tensor:
        """``|c|``; zero for ``n = 0``."""
        return self.max_abs()

    def frobenius_norm(self) -> Tensor:
        """``sqrt(n) |c|``."""
        return math.sqrt(self.size) * self.c.abs()
