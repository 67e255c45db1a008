"""The same block again and again: one member of any structure, k times on the diagonal.

::

    A . .
    . A .        the numbers of A, products those of A with k times the columns
    . . A
"""

from __future__ import annotations

import math
from typing import Any, Self

from torch import Size, Tensor

from structured._core.matrix import Scalar, StructuredMatrix, at_least_float32, static
from structured._core.spec import StructureLike, parse


def part_size(n: int, k: int, name: str) -> int:
    """``n / k``.

    Raises:
        ValueError: If ``k`` is not a positive integer that divides ``n``.
    """
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"{name}(k, A): expected an integer k >= 1, got {k!r}")
    if n % k:
        raise ValueError(
            f"{name}({k}, A): expected a size divisible by {k}, got {n}; "
            f"direct_sum({name}({k}, A), C, {n - n % k}) covers the rest"
        )
    return n // k


class Tied(StructuredMatrix):
    """``I_k (x) A`` for a member ``A`` of any structure, such as one block for all k heads.

    ``Pi(S)`` is ``I_k (x) Pi_A(mean of the k diagonal blocks of S)``: with ``r = I_k (x) a``, the
    equation ``P(r + r^T) = 2 P(S)`` reads ``P_A(a + a^T) = 2 P_A(mean)``.
    """

    A: StructuredMatrix  # [..., n / k, n / k]
    k: int = static()  # number of blocks

    dimensions = ("q q",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.k, int) or isinstance(self.k, bool) or self.k < 1:
            raise ValueError(f"Tied: expected an integer k >= 1, got {self.k!r}")

    @property
    def closed_under_transpose(self) -> bool:  # type: ignore[override]  # depends on the part
        """As ``A``."""
        return self.A.closed_under_transpose

    @classmethod
    def zeros(cls, n: int, k: int, structure: StructureLike, **opts: Any) -> Self:
        """The zero matrix of size ``n``: ``k`` times one block of ``structure``.

        Raises:
            ValueError: If ``k`` is not a positive integer that divides ``n``.
        """
        return cls(parse(structure)(part_size(n, k, "tied"), **opts), k)

    def to_dense(self) -> Tensor:
        """``A`` on the diagonal of zeros, k times."""
        A, n = self.A.to_dense(), self.n
        eye = A.new_ones(self.k).diag()
        return (eye[:, None, :, None] * A[..., None, :, None, :]).reshape(*A.shape[:-2], n, n)

    @property
    def shape(self) -> Size:
        """``[..., n, n]``."""
        n = self.k * self.A.n
        return Size((*self.A.batch_shape, n, n))

    def _fold(self, X: Tensor) -> Tensor:
        """The k blocks of rows of ``X [..., n, m]`` side by side, ``[..., n / k, k m]``."""
        return X.unflatten(-2, (self.k, self.A.n)).movedim(-3, -2).flatten(-2)

    def _unfold(self, Y: Tensor) -> Tensor:
        """Inverse of :meth:`_fold`."""
        m = Y.shape[-1] // self.k
        return Y.unflatten(-1, (self.k, m)).movedim(-2, -3).flatten(-3, -2)

    def mean_block(self, M: Tensor) -> Tensor:
        """Mean of the k diagonal blocks of ``M [..., n, n]``."""
        sizes = (self.k, self.A.n)
        blocks = M.unflatten(-1, sizes).unflatten(-3, sizes).diagonal(dim1=-4, dim2=-2)
        return blocks.mean(-1, dtype=at_least_float32(M.dtype)).to(M.dtype)

    @property
    def mT(self) -> Tied:
        """``I_k (x) A^T``."""
        return Tied(self.A.mT, self.k)

    def matmul(self, other: Self) -> Self:
        """``I_k (x) A B``."""
        return self._build([self.A.matmul(other.A)])

    def apply(self, X: Tensor) -> Tensor:
        """One product of ``A`` with k times the columns."""
        return self._unfold(self.A.apply(self._fold(X)))

    def apply_transpose(self, X: Tensor) -> Tensor:
        """One product of ``A^T`` with k times the columns."""
        return self._unfold(self.A.apply_transpose(self._fold(X)))

    def orthogonal_project(self, M: Tensor) -> Self:
        """Nearest to the mean of the diagonal blocks of ``M [..., n, n]``."""
        return self._build([self.A.orthogonal_project(self.mean_block(M))])

    def project(self, S: Tensor) -> Self:
        """``I_k (x) Pi(mean of the diagonal blocks of S)``."""
        return self._build([self.A.project(self.mean_block(S))])

    def project_gram(self, X: Tensor) -> Self:
        """``I_k (x) Pi(Y Y^T) / k`` with the blocks of rows of ``X`` side by side in ``Y``."""
        return self._build([self.A.project_gram(self._fold(X)) / self.k])

    def orthogonal_project_gram(self, X: Tensor) -> Self:
        """``I_k (x) P(Y Y^T) / k``, likewise."""
        return self._build([self.A.orthogonal_project_gram(self._fold(X)) / self.k])

    def gram(self) -> Self:
        """``I_k (x) Pi(A^T A)``."""
        return self._build([self.A.gram()])

    def exp(self) -> Self:
        """That of ``A``, k times."""
        return self._build([self.A.exp()])

    def diagonal(self) -> Tensor:
        """That of ``A``, k times."""
        return self._repeat(self.A.diagonal())

    def squared_rows(self) -> Tensor:
        """Those of ``A``, k times."""
        return self._repeat(self.A.squared_rows())

    def _repeat(self, each: Tensor) -> Tensor:
        """``[..., n]`` from one block's ``[..., n / k]``."""
        return each[..., None, :].expand(*each.shape[:-1], self.k, self.A.n).flatten(-2)

    def trace(self) -> Tensor:
        """``k tr A``."""
        return self.k * self.A.trace()

    def add_scaled_identity(self, alpha: Scalar) -> Self:
        """``I_k (x) (A + alpha I)``."""
        return self._build([self.A.add_scaled_identity(alpha)])

    def solve(self, X: Tensor) -> Tensor:
        """One solve with ``A`` for k times the columns."""
        return self._unfold(self.A.solve(self._fold(X)))

    def inverse(self) -> Self:
        """``I_k (x) A^{-1}``."""
        return self._build([self.A.inverse()])

    def logdet(self) -> Tensor:
        """``k log|det A|``."""
        return self.k * self.A.logdet()

    def max_abs(self) -> Tensor:
        """As ``A``."""
        return self.A.max_abs()

    def spectral_norm(self) -> Tensor:
        """As ``A``."""
        return self.A.spectral_norm()

    def frobenius_norm(self) -> Tensor:
        """``sqrt(k)`` times that of ``A``."""
        return math.sqrt(self.k) * self.A.frobenius_norm()
