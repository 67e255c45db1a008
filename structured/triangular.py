"""Triangular matrices, both halves folded into one rectangle.

::

    a . . .        a b c d        g h
    b e . .        . e f h        a j
    c f g .        . . g i        b e        n (n + 1) / 2 numbers, stored as on the right,
    d h i j        . . . j        c f        products half of a dense product
                                  d i
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Size, Tensor
from torch.linalg import solve_triangular
from torch.nn.functional import pad

from structured._core.checks import check_pivots
from structured._core.matrix import Scalar, StructuredMatrix
from structured._core.numbers import add_to_diagonal, at_least_float32, largest, trailing
from structured._products.in_place import plain
from structured._products.triangular import adjoint, product, tril_, write_gram


class _Triangular(StructuredMatrix):
    """What the lower and the upper form share: one rectangle with a place for each number.

    With ``L = [[L1, 0], [B, L2]]``, ``R`` holds ``[L1; B]`` as it stands and ``L2^T`` in the places
    above the diagonal of ``L1`` (rectangular full packed format; Gustavson et al., ACM TOMS 37(2),
    2010). The three blocks are views of ``R``, so products run on matrix blocks and skip the half
    of the work that meets the zero block. The upper form stores its transpose.
    """

    R: Tensor  # [..., n + 1 - n % 2, (n + 1) // 2]

    dimensions = ("rows columns",)

    def __post_init__(self) -> None:
        super().__post_init__()
        rows, columns = self.R.shape[-2:]
        if abs(rows - 2 * columns) != 1:
            raise ValueError(
                f"{type(self).__name__}.R: expected [..., n + 1 - n % 2, (n + 1) // 2], got "
                f"{list(self.R.shape)}; zeros(n).orthogonal_project(M) reads a dense M"
            )

    @classmethod
    def zeros(cls, n: int, *, batch_shape: Sequence[int] = (), **opts: Any) -> Self:
        """The zero matrix of size ``n``."""
        return cls(torch.zeros(*batch_shape, n + 1 - n % 2, (n + 1) // 2, **opts))

    @property
    def shape(self) -> Size:
        """``[..., n, n]``."""
        rows, columns = self.R.shape[-2:]
        n = min(rows, 2 * columns)
        return Size((*self.R.shape[:-2], n, n))

    @property
    def _shift(self) -> int:
        """Rows of ``R`` above ``L1``: one for even n, none for odd."""
        return 1 - self.n % 2

    def _diagonals(self, R: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the diagonals of ``L1`` and ``L2`` in a rectangle like ours."""
        shift = self._shift
        return R.diagonal(-shift, -2, -1), R.diagonal(1 - shift, -2, -1)

    def _below(self, columns: Tensor) -> Tensor:
        """A copy of the first columns ``[..., n, h]`` in their place in the rectangle."""
        return pad(columns, (0, 0, self._shift, 0))

    def _fold(self, R: Tensor, U: Tensor) -> Self:
        """The member with ``[L1; B]`` in ``R`` and ``L2^T`` in ``U``, in their memory."""
        n, h = self.n, self.R.shape[-1]
        if not plain(R, U):
            corner = pad(U.triu(), (2 * h - n, 0, 0, R.shape[-2] - (n - h)))
            return self._build([R.tril(-self._shift) + corner])
        R = R.tril_(-self._shift)
        R[..., : n - h, h - (n - h) :].add_(tril_(U.mT).mT)
        return self._build([R])

    def _fold_twice(self, R: Tensor, U: Tensor) -> Self:
        """``Pi`` of the symmetric matrix of which these are twice the blocks."""
        member = self._fold(R, U)
        for diagonal in self._diagonals(member.R):
            diagonal /= 2
        return member

    def project(self, S: Tensor) -> Self:
        """The triangle of ``S [..., n, n]``, twice off the diagonal."""
        h = self.R.shape[-1]
        return self._fold_twice(self._below(S[..., :h]).mul_(2), 2 * S[..., h:, h:])

    def project_gram(self, X: Tensor) -> Self:
        """The triangle of ``X X^T``, twice off the diagonal; at most 3/4 n^2 a column."""
        n, h, shift, batch = self.n, self.R.shape[-1], self._shift, X.shape[:-2]
        R, U = X.new_empty(*batch, n + shift, h), X.new_empty(*batch, n - h, n - h)
        write_gram(R[..., shift:, :], X)
        write_gram(U.mT, X[..., h:, :])
        return self._fold_twice(R, U)

    def orthogonal_project_gram(self, X: Tensor) -> Self:
        """The same triangle, once."""
        member = self.project_gram(X) / 2
        for diagonal in self._diagonals(member.R):
            diagonal *= 2
        return member

    def diagonal(self) -> Tensor:
        """Those of ``L1`` and of ``L2``."""
        return torch.cat(self._diagonals(self.R), -1)

    def add_scaled_identity(self, alpha: Scalar) -> Self:
        """Add to the diagonal."""
        shift = self._shift
        R = add_to_diagonal(self.R, alpha, -shift)
        second = R.diagonal(1 - shift, -2, -1)  # R is a copy, and as much transformed as alpha
        second += trailing(alpha, second) if isinstance(alpha, Tensor) else alpha
        return self._build([R])

    def _check_pivots(self) -> None:
        for diagonal in self._diagonals(self.R):
            check_pivots(diagonal)

    def logdet(self) -> Tensor:
        """Sum of ``log |A_ii|``."""
        return self.diagonal().abs().log().sum(-1)

    def max_abs(self) -> Tensor:
        """Largest absolute entry."""
        return largest(self.R, self.R.ndim - 2)

    def frobenius_norm(self) -> Tensor:
        """Norm of the rectangle: each number stands for one entry."""
        return torch.linalg.vector_norm(self.R, dim=(-2, -1))


class LowerTriangular(_Triangular):
    """``A_ij = 0`` for ``i < j``. Stores n (n + 1) / 2 numbers; ``A X`` costs n^2 / 2 a column."""

    @property
    def _blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        """Views of ``L1``, ``B``, ``L2``; above their diagonals they show each other's numbers."""
        n, h, shift = self.n, self.R.shape[-1], self._shift
        L1, B = self.R[..., shift : shift + h, :], self.R[..., shift + h :, :]
        return L1, B, self.R[..., : n - h, h - (n - h) :].mT

    @property
    def _columns(self) -> Tensor:
        """``[L1; B]``, the first ``n - n // 2`` columns."""
        return self.R[..., self._shift :, :].tril()

    @property
    def _rows(self) -> Tensor:
        """``[B, L2]``, the last ``n // 2`` rows."""
        _, B, L2 = self._blocks
        return torch.cat([B, L2.tril()], -1)

    def to_dense(self) -> Tensor:
        """``[[L1, 0], [B, L2]]``."""
        return torch.cat([pad(self._blocks[0].tril(), (0, self.n // 2)), self._rows], -2)

    @property
    def mT(self) -> UpperTriangular:
        """The upper form of the same numbers."""
        return UpperTriangular(self.R)

    def matmul(self, other: Self) -> Self:
        """``[[L1 M1, 0], [B M1 + L2 C, L2 M2]]``, half the work of a dense product."""
        columns, h = other._columns, self.R.shape[-1]
        first = self._blocks[0].tril() @ columns[..., :h, :]
        last = self._blocks[2].tril() @ other._blocks[2].tril()
        return self._fold(self._below(torch.cat([first, self._rows @ columns], -2)), last.mT)

    def apply(self, X: Tensor) -> Tensor:
        """``[L1 x1, B x1 + L2 x2]``."""
        h = self.R.shape[-1]
        x1, x2 = X[..., :h, :], X[..., h:, :]
        L1, B, L2 = self._blocks
        return torch.cat([product(L1, x1), B @ x1 + product(L2, x2)], -2)

    def apply_transpose(self, X: Tensor) -> Tensor:
        """``[L1^T x1 + B^T x2, L2^T x2]``."""
        h = self.R.shape[-1]
        x1, x2 = X[..., :h, :], X[..., h:, :]
        L1, B, L2 = self._blocks
        return torch.cat([adjoint(L1, x1) + B.mT @ x2, adjoint(L2, x2)], -2)

    def orthogonal_project(self, M: Tensor) -> Self:
        """The lower triangle of ``M [..., n, n]``."""
        h = self.R.shape[-1]
        return self._fold(self._below(M[..., :h]), M[..., h:, h:].mT.clone())

    def gram(self) -> Self:
        """``Pi(A^T A)``, half the work of a dense product."""
        _, B, L2 = self._blocks
        columns, L2 = self._columns, L2.tril()
        first = torch.cat([columns.mT @ columns, L2.mT @ B], -2)
        return self._fold_twice(self._below(first).mul_(2), 2 * (L2.mT @ L2))

    def _outer(self) -> Self:
        """``Pi(A A^T)``, half the work of a dense product."""
        columns, rows = self._columns, self._rows
        L1 = columns[..., : self.R.shape[-1], :]
        return self._fold_twice(self._below(columns @ L1.mT).mul_(2), 2 * (rows @ rows.mT))

    def solve(self, X: Tensor) -> Tensor:
        """Forward substitution, n^2 / 2 a column.

        Raises:
            RuntimeError: If ``A`` is singular (``torch.linalg.LinAlgError``).
        """
        self._check_pivots()
        h, wide = self.R.shape[-1], at_least_float32(X.dtype)
        L1, B, L2 = (block.to(wide) for block in self._blocks)
        y1, y2 = X[..., :h, :].to(wide), X[..., h:, :].to(wide)
        x1 = solve_triangular(L1, y1, upper=False)
        x2 = solve_triangular(L2, y2 - B @ x1, upper=False)
        return torch.cat([x1, x2], -2).to(X.dtype)

    def inverse(self) -> Self:
        """``[[L1^-1, 0], [-L2^-1 B L1^-1, L2^-1]]``, by substitution.

        Raises:
            RuntimeError: If ``A`` is singular (``torch.linalg.LinAlgError``).
        """
        self._check_pivots()
        wide = at_least_float32(self.dtype)
        L1, B, L2 = (block.to(wide) for block in self._blocks)
        eye = torch.eye(L1.shape[-1], dtype=wide, device=self.device)
        first = solve_triangular(L1, eye, upper=False)
        # of L2: what is below the inverse of L1, and the inverse of L2
        both = torch.cat([-B @ first, eye[: L2.shape[-1], : L2.shape[-1]].expand(L2.shape)], -1)
        mixed, last = solve_triangular(L2, both, upper=False).split(
            [first.shape[-1], L2.shape[-1]], -1
        )
        columns = torch.cat([first, mixed], -2).to(self.dtype)
        return self._fold(self._below(columns), last.to(self.dtype).mT.clone())

    def _solve_transpose(self, X: Tensor) -> Tensor:
        """``A^{-T} X``, back substitution."""
        self._check_pivots()
        h, wide = self.R.shape[-1], at_least_float32(X.dtype)
        L1, B, L2 = (block.to(wide) for block in self._blocks)
        y1, y2 = X[..., :h, :].to(wide), X[..., h:, :].to(wide)
        x2 = solve_triangular(L2.mT, y2, upper=True)
        x1 = solve_triangular(L1.mT, y1 - B.mT @ x2, upper=True)
        return torch.cat([x1, x2], -2).to(X.dtype)


class UpperTriangular(_Triangular):
    """``A_ij = 0`` for ``i > j``. Stores n (n + 1) / 2 numbers; ``A X`` costs n^2 / 2 a column."""

    def to_dense(self) -> Tensor:
        """``[[L1^T, B^T], [0, L2^T]]``."""
        return self.mT.to_dense().mT

    @property
    def mT(self) -> LowerTriangular:
        """The lower form of the same numbers."""
        return LowerTriangular(self.R)

    def matmul(self, other: Self) -> Self:
        """``A B = (B^T A^T)^T``."""
        return self._build([other.mT.matmul(self.mT).R])

    def apply(self, X: Tensor) -> Tensor:
        """``[L1^T x1 + B^T x2, L2^T x2]``."""
        return self.mT.apply_transpose(X)

    def apply_transpose(self, X: Tensor) -> Tensor:
        """``[L1 x1, B x1 + L2 x2]``."""
        return self.mT.apply(X)

    def orthogonal_project(self, M: Tensor) -> Self:
        """The upper triangle of ``M [..., n, n]``."""
        return self._build([self.mT.orthogonal_project(M.mT).R])

    def gram(self) -> Self:
        """``Pi(A^T A)``, half the work of a dense product."""
        return self._build([self.mT._outer().R])

    def solve(self, X: Tensor) -> Tensor:
        """Back substitution, n^2 / 2 a column.

        Raises:
            RuntimeError: If ``A`` is singular (``torch.linalg.LinAlgError``).
        """
        return self.mT._solve_transpose(X)

    def inverse(self) -> Self:
        """As of the lower form."""
        return self._build([self.mT.inverse().R])
