"""Interleaved blocks: each residue class of indices mod k has its own member of any structure.

::

    a . b .
    . e . f
    c . d .        k times the numbers and costs of A at size n / k
    . g . h
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Size, Tensor

from structured._core.matrix import Scalar, StructuredMatrix
from structured._core.spec import StructureLike, parse
from structured.tied import part_size


class Strided(StructuredMatrix):
    """``sum_r A_r (x) e_r e_r^T`` for k members ``A_r``: ``M_{ak+r, bk+r} = (A_r)_ab``, else zero.

    Where a block-diagonal matrix couples the indices within each group of k, this couples the same
    place of all groups: across channels at one kernel offset, across heads at one coordinate. It
    is block-diagonal up to a permutation.
    """

    A: StructuredMatrix  # [..., k, n / k, n / k], the members of the k residue classes

    dimensions = ("k q q",)

    @property
    def closed_under_transpose(self) -> bool:  # type: ignore[override]  # depends on the part
        """As ``A``."""
        return self.A.closed_under_transpose

    @classmethod
    def zeros(
        cls,
        n: int,
        k: int,
        structure: StructureLike,
        *,
        batch_shape: Sequence[int] = (),
        **opts: Any,
    ) -> Self:
        """The zero matrix of size ``n``: ``k`` interleaved members of ``structure``.

        Raises:
            ValueError: If ``k`` is not a positive integer that divides ``n``.
        """
        size = part_size(n, k, "strided")
        return cls(parse(structure)(size, batch_shape=(*batch_shape, k), **opts))

    def to_dense(self) -> Tensor:
        """The members interleaved, zeros between them."""
        spread = torch.diag_embed(self.A.to_dense().movedim(-3, -1))  # [..., a, b, r, r]
        return spread.movedim(-2, -3).reshape(self.shape)

    @property
    def _sizes(self) -> tuple[int, int]:
        """``(n / k, k)``."""
        return self.A.n, self.A.batch_shape[-1]

    @property
    def shape(self) -> Size:
        """``[..., n, n]``."""
        q, k = self._sizes
        return Size((*self.A.batch_shape[:-1], q * k, q * k))

    def _split(self, X: Tensor) -> Tensor:
        """Rows of ``X [..., n, m]`` by class, ``[..., k, n / k, m]``."""
        return X.unflatten(-2, self._sizes).movedim(-2, -3)

    def _join(self, Y: Tensor) -> Tensor:
        """Inverse of :meth:`_split`."""
        return Y.movedim(-3, -2).flatten(-3, -2)

    def blocks(self, M: Tensor) -> Tensor:
        """Blocks of ``M [..., n, n]`` of each class with itself, ``[..., k, n / k, n / k]``."""
        grid = M.unflatten(-1, self._sizes).unflatten(-3, self._sizes)
        return grid.diagonal(dim1=-3, dim2=-1).movedim(-1, -3)

    @property
    def mT(self) -> Strided:
        """Every member transposed."""
        return Strided(self.A.mT)

    def matmul(self, other: Self) -> Self:
        """Class by class."""
        return self._build([self.A.matmul(other.A)])

    def apply(self, X: Tensor) -> Tensor:
        """Class by class."""
        return self._join(self.A.apply(self._split(X)))

    def apply_transpose(self, X: Tensor) -> Tensor:
        """Class by class."""
        return self._join(self.A.apply_transpose(self._split(X)))

    def orthogonal_project(self, M: Tensor) -> Self:
        """Class by class."""
        return self._build([self.A.orthogonal_project(self.blocks(M))])

    def project(self, S: Tensor) -> Self:
        """Class by class."""
        return self._build([self.A.project(self.blocks(S))])

    def project_gram(self, X: Tensor) -> Self:
        """``Pi(X_r X_r^T)`` for the rows of every class."""
        return self._build([self.A.project_gram(self._split(X))])

    def orthogonal_project_gram(self, X: Tensor) -> Self:
        """``P(X_r X_r^T)`` for the rows of every class."""
        return self._build([self.A.orthogonal_project_gram(self._split(X))])

    def gram(self) -> Self:
        """Class by class."""
        return self._build([self.A.gram()])

    def exp(self) -> Self:
        """Class by class."""
        return self._build([self.A.exp()])

    def diagonal(self) -> Tensor:
        """Those of the classes interleaved."""
        return self.A.diagonal().mT.flatten(-2)

    def squared_rows(self) -> Tensor:
        """Those of the classes interleaved."""
        return self.A.squared_rows().mT.flatten(-2)

    def trace(self) -> Tensor:
        """Sum of the traces."""
        return self.A.trace().sum(-1)

    def add_scaled_identity(self, alpha: Scalar) -> Self:
        """To every member."""
        if isinstance(alpha, Tensor) and alpha.ndim:
            alpha = alpha[..., None].expand(self.A.batch_shape)
        return self._build([self.A.add_scaled_identity(alpha)])

    def solve(self, X: Tensor) -> Tensor:
        """Class by class."""
        return self._join(self.A.solve(self._split(X)))

    def inverse(self) -> Self:
        """Class by class."""
        return self._build([self.A.inverse()])

    def logdet(self) -> Tensor:
        """Sum over the classes."""
        return self.A.logdet().sum(-1)

    def max_abs(self) -> Tensor:
        """Largest absolute entry."""
        return self.A.max_abs().amax(-1)

    def spectral_norm(self) -> Tensor:
        """The largest of the classes'."""
        return self.A.spectral_norm().amax(-1)

    def frobenius_norm(self) -> Tensor:
        """Square root of the sum of all squared entries."""
        return torch.linalg.vector_norm(self.A.frobenius_norm(), dim=-1)
