"""The transpose of any structure: what ``A.mT`` is where a class has no name for it.

::

    A^T          as many numbers and the same costs as A
"""

from __future__ import annotations

from typing import Any, Self

from torch import Size, Tensor

from structured._core.matrix import Scalar, StructuredMatrix
from structured._core.spec import StructureLike, parse


class Transposed(StructuredMatrix):
    """``A^T`` for a member ``A`` of any structure."""

    A: StructuredMatrix

    @property
    def closed_under_transpose(self) -> bool:  # type: ignore[override]  # depends on the part
        """As ``A``."""
        return self.A.closed_under_transpose

    @classmethod
    def zeros(cls, n: int, structure: StructureLike, **opts: Any) -> Self:
        """The zero matrix of size ``n`` in the transpose of ``structure``."""
        return cls(parse(structure)(n, **opts))

    def to_dense(self) -> Tensor:
        """``A^T``."""
        return self.A.to_dense().mT

    @property
    def shape(self) -> Size:
        """``[..., n, n]``."""
        return self.A.shape

    @property
    def mT(self) -> StructuredMatrix:
        """``A``."""
        return self.A

    def matmul(self, other: Self) -> Self:
        """``A^T B^T = (B A)^T``."""
        return self._build([other.A.matmul(self.A)])

    def apply(self, X: Tensor) -> Tensor:
        """``A^T X``."""
        return self.A.apply_transpose(X)

    def apply_transpose(self, X: Tensor) -> Tensor:
        """``A X``."""
        return self.A.apply(X)

    def orthogonal_project(self, M: Tensor) -> Self:
        """``P_A(M^T)^T``."""
        return self._build([self.A.orthogonal_project(M.mT)])

    def project(self, S: Tensor) -> Self:
        """``Pi_A(S)^T``."""
        return self._build([self.A.project(S)])

    def project_gram(self, X: Tensor) -> Self:
        """``Pi_A(X X^T)^T``."""
        return self._build([self.A.project_gram(X)])

    def gram(self) -> Self:
        """``Pi(A A^T)``; by the class of ``A.mT`` if it has one of its own."""
        named = self.A.mT
        if isinstance(named, Transposed) or named.mT.layout != self.A.layout:
            return self._build([self.A._outer()])
        return self._build([named.gram().mT])

    def solve(self, X: Tensor) -> Tensor:
        """``A^-T X``; by the class of ``A.mT`` if it has one of its own."""
        named = self.A.mT
        unnamed = isinstance(named, Transposed)
        return self.A._solve_transpose(X) if unnamed else named.solve(X)

    def trace(self) -> Tensor:
        """As ``A``."""
        return self.A.trace()

    def add_scaled_identity(self, alpha: Scalar) -> Self:
        """``(A + alpha I)^T``."""
        return self._build([self.A.add_scaled_identity(alpha)])

    def logdet(self) -> Tensor:
        """As ``A``."""
        return self.A.logdet()

    def max_abs(self) -> Tensor:
        """As ``A``."""
        return self.A.max_abs()

    def frobenius_norm(self) -> Tensor:
        """As ``A``."""
        return self.A.frobenius_norm()
