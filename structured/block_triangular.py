"""Block-triangular combinators of any two structures, and the families they compose.

::

    A B        A .
    . C        B C        the numbers of A and C, and one full block B
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Size, Tensor

from structured._core.matrix import Scalar, StructuredMatrix, joint_norm, largest
from structured._core.spec import Structure, StructureLike, composition, parse
from structured.dense import Dense
from structured.diagonal import Diagonal


def split_sizes(n: int, split: int) -> tuple[int, int]:
    """Sizes of the two parts: ``split`` is a slice index, 15 at most 15 first, -15 at most 15 last.

    Raises:
        ValueError: If ``split`` is not an integer.
    """
    if not isinstance(split, int) or isinstance(split, bool):
        raise ValueError(f"split: expected an integer (a slice index), got {split!r}")
    first = len(range(n)[:split])
    return first, n - first


class _BlockTriangular(StructuredMatrix):
    """What the upper and the lower form share: the parts, and all that is blind to their places."""

    A: StructuredMatrix  # [..., n1, n1]
    B: Tensor  # [..., n1, n2] (upper) or [..., n2, n1] (lower)
    C: StructuredMatrix  # [..., n2, n2]

    @classmethod
    def zeros(
        cls,
        n: int,
        first: StructureLike,
        last: StructureLike,
        split: int,
        *,
        batch_shape: Sequence[int] = (),
        **opts: Any,
    ) -> Self:
        """The zero matrix of size ``n`` with structures ``first`` and ``last`` on the diagonal.

        ``split`` is a slice index: 15 gives ``first`` at most 15 rows, -15 ``last`` at most 15.
        """
        n1, n2 = split_sizes(n, split)
        A = parse(first)(n1, batch_shape=batch_shape, **opts)
        C = parse(last)(n2, batch_shape=batch_shape, **opts)
        sizes = {"n1": n1, "n2": n2}
        rows, columns = (sizes[letter] for letter in cls.dimensions[1].split())
        return cls(A, torch.zeros(*batch_shape, rows, columns, **opts), C)

    @property
    def shape(self) -> Size:
        """``[..., n, n]``."""
        n = self.A.n + self.C.n
        return Size((*self.B.shape[:-2], n, n))

    def _split(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of ``X [..., n, m]`` for ``A`` and for ``C``."""
        k = self.A.n
        return X[..., :k, :], X[..., k:, :]

    def exp(self) -> Self:
        """By products."""
        return self._exp_by_products()

    def diagonal(self) -> Tensor:
        """Those of ``A`` and of ``C``."""
        return torch.cat([self.A.diagonal(), self.C.diagonal()], -1)

    def trace(self) -> Tensor:
        """``tr A + tr C``."""
        return self.A.trace() + self.C.trace()

    def add_scaled_identity(self, alpha: Scalar) -> Self:
        """To ``A`` and to ``C``."""
        A, C = self.A.add_scaled_identity(alpha), self.C.add_scaled_identity(alpha)
        return self._build([A, self.B.clone(), C])

    def logdet(self) -> Tensor:
        """``log|det A| + log|det C|``."""
        return self.A.logdet() + self.C.logdet()

    def max_abs(self) -> Tensor:
        """Largest absolute entry."""
        B = largest(self.B, self.B.ndim - 2)
        return torch.maximum(torch.maximum(self.A.max_abs(), B), self.C.max_abs())

    def frobenius_norm(self) -> Tensor:
        """Square root of the sum of all squared entries."""
        B = torch.linalg.vector_norm(self.B, dim=(-2, -1))
        return joint_norm(self.A.frobenius_norm(), B, self.C.frobenius_norm())


class BlockUpper(_BlockTriangular):
    """``[[A, B], [0, C]]`` for members ``A`` and ``C`` of any two structures."""

    dimensions = ("n1 n1", "n1 n2", "n2 n2")

    def to_dense(self) -> Tensor:
        """``[[A, B], [0, C]]``."""
        top = torch.cat([self.A.to_dense(), self.B], -1)
        return torch.cat([top, torch.nn.functional.pad(self.C.to_dense(), (self.A.n, 0))], -2)

    @property
    def mT(self) -> BlockLower:
        """``[[A^T, 0], [B^T, C^T]]``."""
        return BlockLower(self.A.mT, self.B.mT, self.C.mT)

    def matmul(self, other: Self) -> Self:
        """``[[A A', A B' + B C'], [0, C C']]``."""
        B = self.A.apply(other.B) + other.C.apply_transpose(self.B.mT).mT
        return self._build([self.A.matmul(other.A), B, self.C.matmul(other.C)])

    def apply(self, X: Tensor) -> Tensor:
        """``[A x1 + B x2, C x2]``."""
        x1, x2 = self._split(X)
        return torch.cat([self.A.apply(x1) + self.B @ x2, self.C.apply(x2)], -2)

    def apply_transpose(self, X: Tensor) -> Tensor:
        """``[A^T x1, B^T x1 + C^T x2]``."""
        x1, x2 = self._split(X)
        y2 = self.B.mT @ x1 + self.C.apply_transpose(x2)
        return torch.cat([self.A.apply_transpose(x1), y2], -2)

    def orthogonal_project(self, M: Tensor) -> Self:
        """Part by part."""
        k = self.A.n
        A = self.A.orthogonal_project(M[..., :k, :k])
        return self._build([A, M[..., :k, k:].clone(), self.C.orthogonal_project(M[..., k:, k:])])

    def project(self, S: Tensor) -> Self:
        """``[[Pi(S11), 2 S12], [0, Pi(S22)]]``."""
        k = self.A.n
        A, C = self.A.project(S[..., :k, :k]), self.C.project(S[..., k:, k:])
        return self._build([A, 2 * S[..., :k, k:], C])

    def project_gram(self, X: Tensor) -> Self:
        """``[[Pi(x1 x1^T), 2 x1 x2^T], [0, Pi(x2 x2^T)]]``."""
        x1, x2 = self._split(X)
        return self._build([self.A.project_gram(x1), 2 * (x1 @ x2.mT), self.C.project_gram(x2)])

    def orthogonal_project_gram(self, X: Tensor) -> Self:
        """``[[P(x1 x1^T), x1 x2^T], [0, P(x2 x2^T)]]``."""
        x1, x2 = self._split(X)
        A, C = self.A.orthogonal_project_gram(x1), self.C.orthogonal_project_gram(x2)
        return self._build([A, x1 @ x2.mT, C])

    def gram(self) -> Self:
        """``[[Pi(A^T A), 2 A^T B], [0, Pi(B^T B + C^T C)]]``."""
        C = self.C.gram() + self.C.project_gram(self.B.mT)
        return self._build([self.A.gram(), 2 * self.A.apply_transpose(self.B), C])

    def solve(self, X: Tensor) -> Tensor:
        """Back substitution by blocks."""
        y1, y2 = self._split(X)
        x2 = self.C.solve(y2)
        return torch.cat([self.A.solve(y1 - self.B @ x2), x2], -2)

    def squared_rows(self) -> Tensor:
        """Those of ``A`` and of ``B``, then those of ``C``."""
        first = self.A.squared_rows() + self.B.square().sum(-1)
        return torch.cat([first, self.C.squared_rows()], -1)

    def inverse(self) -> Self:
        """``[[A^-1, -A^-1 B C^-1], [0, C^-1]]``."""
        B = self.C.mT.solve(self.A.solve(-self.B).mT).mT
        return self._build([self.A.inverse(), B, self.C.inverse()])


class BlockLower(_BlockTriangular):
    """``[[A, 0], [B, C]]`` for members ``A`` and ``C`` of any two structures."""

    dimensions = ("n1 n1", "n2 n1", "n2 n2")

    def to_dense(self) -> Tensor:
        """``[[A, 0], [B, C]]``."""
        bottom = torch.cat([self.B, self.C.to_dense()], -1)
        return torch.cat([torch.nn.functional.pad(self.A.to_dense(), (0, self.C.n)), bottom], -2)

    @property
    def mT(self) -> BlockUpper:
        """``[[A^T, B^T], [0, C^T]]``."""
        return BlockUpper(self.A.mT, self.B.mT, self.C.mT)

    def matmul(self, other: Self) -> Self:
        """``[[A A', 0], [B A' + C B', C C']]``."""
        B = other.A.apply_transpose(self.B.mT).mT + self.C.apply(other.B)
        return self._build([self.A.matmul(other.A), B, self.C.matmul(other.C)])

    def apply(self, X: Tensor) -> Tensor:
        """``[A x1, B x1 + C x2]``."""
        x1, x2 = self._split(X)
        return torch.cat([self.A.apply(x1), self.B @ x1 + self.C.apply(x2)], -2)

    def apply_transpose(self, X: Tensor) -> Tensor:
        """``[A^T x1 + B^T x2, C^T x2]``."""
        x1, x2 = self._split(X)
        y1 = self.A.apply_transpose(x1) + self.B.mT @ x2
        return torch.cat([y1, self.C.apply_transpose(x2)], -2)

    def orthogonal_project(self, M: Tensor) -> Self:
        """Part by part."""
        k = self.A.n
        A = self.A.orthogonal_project(M[..., :k, :k])
        return self._build([A, M[..., k:, :k].clone(), self.C.orthogonal_project(M[..., k:, k:])])

    def project(self, S: Tensor) -> Self:
        """``[[Pi(S11), 0], [2 S21, Pi(S22)]]``."""
        k = self.A.n
        A, C = self.A.project(S[..., :k, :k]), self.C.project(S[..., k:, k:])
        return self._build([A, 2 * S[..., k:, :k], C])

    def project_gram(self, X: Tensor) -> Self:
        """``[[Pi(x1 x1^T), 0], [2 x2 x1^T, Pi(x2 x2^T)]]``."""
        x1, x2 = self._split(X)
        return self._build([self.A.project_gram(x1), 2 * (x2 @ x1.mT), self.C.project_gram(x2)])

    def orthogonal_project_gram(self, X: Tensor) -> Self:
        """``[[P(x1 x1^T), 0], [x2 x1^T, P(x2 x2^T)]]``."""
        x1, x2 = self._split(X)
        A, C = self.A.orthogonal_project_gram(x1), self.C.orthogonal_project_gram(x2)
        return self._build([A, x2 @ x1.mT, C])

    def gram(self) -> Self:
        """``[[Pi(A^T A + B^T B), 0], [2 C^T B, Pi(C^T C)]]``."""
        A = self.A.gram() + self.A.project_gram(self.B.mT)
        return self._build([A, 2 * self.C.apply_transpose(self.B), self.C.gram()])

    def solve(self, X: Tensor) -> Tensor:
        """Forward substitution by blocks."""
        y1, y2 = self._split(X)
        x1 = self.A.solve(y1)
        return torch.cat([x1, self.C.solve(y2 - self.B @ x1)], -2)

    def squared_rows(self) -> Tensor:
        """Those of ``A``, then those of ``B`` and of ``C``."""
        last = self.B.square().sum(-1) + self.C.squared_rows()
        return torch.cat([self.A.squared_rows(), last], -1)

    def inverse(self) -> Self:
        """``[[A^-1, 0], [-C^-1 B A^-1, C^-1]]``."""
        B = self.A.mT.solve(self.C.solve(-self.B).mT).mT
        return self._build([self.A.inverse(), B, self.C.inverse()])


@composition
def low_rank_upper(k: int) -> Structure:
    """A dense corner of size ``|k|``, a full block beside or above it, and a diagonal.

    ::

        a a b b        a . b b
        a a b b        . a b b        k = 2 (corner first) and k = -2 (corner last)
        . . c .        . . c c
        . . . c        . . c c

    Source: Lin et al., arXiv 2312.05705, "rank-k triangular" structure.
    """
    return _low_rank(BlockUpper, k, f"low_rank_upper({k})")


@composition
def low_rank_lower(k: int) -> Structure:
    """The transpose of :func:`low_rank_upper`: ``|k|`` full rows or columns below."""
    return _low_rank(BlockLower, k, f"low_rank_lower({k})")


def _low_rank(cls: type[_BlockTriangular], k: int, label: str) -> Structure:
    parts = (Structure(Dense), Structure(Diagonal))
    first, last = parts if k >= 0 else reversed(parts)
    return Structure(cls, (first, last, k), label=label)
