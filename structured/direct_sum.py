"""Direct sums: two different structures on the diagonal.

::

    A .
    . C        the numbers and costs of A and of C
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Size, Tensor
from torch.nn.functional import pad

from structured._core.matrix import Scalar, StructuredMatrix, joint_norm
from structured._core.spec import StructureLike, parse
from structured.block_triangular import split_sizes


class DirectSum(StructuredMatrix):
    """``[[A, 0], [0, C]]`` for members ``A`` and ``C`` of any two structures."""

    A: StructuredMatrix  # [..., n1, n1]
    C: StructuredMatrix  # [..., n2, n2]

    dimensions = ("n1 n1", "n2 n2")

    @property
    def closed_under_transpose(self) -> bool:  # type: ignore[override]  # depends on the parts
        """If both parts are."""
        return self.A.closed_under_transpose and self.C.closed_under_transpose

    @classmethod
    def zeros(
        cls, n: int, first: StructureLike, last: StructureLike, split: int, **opts: Any
    ) -> Self:
        """The zero matrix of size ``n`` with structures ``first`` and ``last`` on the diagonal.

        ``split`` is a slice index: 15 gives ``first`` at most 15 rows, -15 ``last`` at most 15.

        Raises:
            ValueError: If ``split`` is not an integer.
        """
        n1, n2 = split_sizes(n, split)
        return cls(parse(first)(n1, **opts), parse(last)(n2, **opts))

    def to_dense(self) -> Tensor:
        """``[[A, 0], [0, C]]``."""
        top = pad(self.A.to_dense(), (0, self.C.n))
        return torch.cat([top, pad(self.C.to_dense(), (self.A.n, 0))], -2)

    @property
    def shape(self) -> Size:
        """``[..., n, n]``."""
        n = self.A.n + self.C.n
        return Size((*self.A.batch_shape, n, n))

    def _split(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of ``X [..., n, m]`` for ``A`` and for ``C``."""
        k = self.A.n
        return X[..., :k, :], X[..., k:, :]

    @property
    def mT(self) -> DirectSum:
        """``[[A^T, 0], [0, C^T]]``."""
        return DirectSum(self.A.mT, self.C.mT)

    def matmul(self, other: Self) -> Self:
        """Part by part."""
        return self._build([self.A.matmul(other.A), self.C.matmul(other.C)])

    def apply(self, X: Tensor) -> Tensor:
        """``[A x1, C x2]``."""
        x1, x2 = self._split(X)
        return torch.cat([self.A.apply(x1), self.C.apply(x2)], -2)

    def apply_transpose(self, X: Tensor) -> Tensor:
        """``[A^T x1, C^T x2]``."""
        x1, x2 = self._split(X)
        return torch.cat([self.A.apply_transpose(x1), self.C.apply_transpose(x2)], -2)

    def orthogonal_project(self, M: Tensor) -> Self:
        """Part by part."""
        k = self.A.n
        first, last = M[..., :k, :k], M[..., k:, k:]
        return self._build([self.A.orthogonal_project(first), self.C.orthogonal_project(last)])

    def project(self, S: Tensor) -> Self:
        """``[[Pi(S11), 0], [0, Pi(S22)]]``."""
        k = self.A.n
        return self._build([self.A.project(S[..., :k, :k]), self.C.project(S[..., k:, k:])])

    def project_gram(self, X: Tensor) -> Self:
        """``[[Pi(x1 x1^T), 0], [0, Pi(x2 x2^T)]]``."""
        x1, x2 = self._split(X)
        return self._build([self.A.project_gram(x1), self.C.project_gram(x2)])

    def orthogonal_project_gram(self, X: Tensor) -> Self:
        """``[[P(x1 x1^T), 0], [0, P(x2 x2^T)]]``."""
        x1, x2 = self._split(X)
        A, C = self.A.orthogonal_project_gram(x1), self.C.orthogonal_project_gram(x2)
        return self._build([A, C])

    def gram(self) -> Self:
        """Part by part."""
        return self._build([self.A.gram(), self.C.gram()])

    def exp(self) -> Self:
        """Part by part."""
        return self._build([self.A.exp(), self.C.exp()])

    def diagonal(self) -> Tensor:
        """Those of ``A`` and of ``C``."""
        return torch.cat([self.A.diagonal(), self.C.diagonal()], -1)

    def squared_rows(self) -> Tensor:
        """Those of ``A`` and of ``C``."""
        return torch.cat([self.A.squared_rows(), self.C.squared_rows()], -1)

    def trace(self) -> Tensor:
        """``tr A + tr C``."""
        return self.A.trace() + self.C.trace()

    def add_scaled_identity(self, alpha: Scalar) -> Self:
        """To ``A`` and to ``C``."""
        return self._build([self.A.add_scaled_identity(alpha), self.C.add_scaled_identity(alpha)])

    def solve(self, X: Tensor) -> Tensor:
        """Part by part."""
        x1, x2 = self._split(X)
        return torch.cat([self.A.solve(x1), self.C.solve(x2)], -2)

    def inverse(self) -> Self:
        """Part by part."""
        return self._build([self.A.inverse(), self.C.inverse()])

    def logdet(self) -> Tensor:
        """``log|det A| + log|det C|``."""
        return self.A.logdet() + self.C.logdet()

    def max_abs(self) -> Tensor:
        """Largest absolute entry."""
        return torch.maximum(self.A.max_abs(), self.C.max_abs())

    def spectral_norm(self) -> Tensor:
        """The larger one."""
        return torch.maximum(self.A.spectral_norm(), self.C.spectral_norm())

    def frobenius_norm(self) -> Tensor:
        """Square root of the sum of all squared entries."""
        return joint_norm(self.A.frobenius_norm(), self.C.frobenius_norm())
