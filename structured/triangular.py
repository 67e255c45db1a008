"""Triangular matrices, both halves folded into one rectangle.

::

    a . . .        a b c d        g h
    b e . .        . e f h        a j
    c f g .        . . g i        b e        n (n + 1) / 2 numbers, stored as on the right,
    d h i j        . . . j        c f        products half of a dense product
                                  d i
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor
from torch.linalg import solve_triangular
from torch.nn.functional import pad

from structured._core.numbers import at_least_float32
from structured._products.triangular import adjoint, product
from structured._transforms import folded
from structured._triangular import Triangular


class LowerTriangular(Triangular):
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
        if self._is_small:
            return folded.unfold(self.R, self.n)
        return torch.cat([pad(self._blocks[0].tril(), (0, self.n // 2)), self._rows], -2)

    @property
    def mT(self) -> UpperTriangular:
        """The upper form of the same numbers."""
        return UpperTriangular(self.R)

    def matmul(self, other: Self) -> Self:
        """``[[L1 M1, 0], [B M1 + L2 C, L2 M2]]``, half the work of a dense product."""
        if self._is_small:
            return self._build([folded.fold(self.to_dense() @ other.to_dense())])
        columns, h = other._columns, self.R.shape[-1]
        first = self._blocks[0].tril() @ columns[..., :h, :]
        last = self._blocks[2].tril() @ other._blocks[2].tril()
        return self._fold(self._below(torch.cat([first, self._rows @ columns], -2)), last.mT)

    def apply(self, X: Tensor) -> Tensor:
        """``[L1 x1, B x1 + L2 x2]``."""
        if self._is_small:
            return self.to_dense() @ X
        h = self.R.shape[-1]
        x1, x2 = X[..., :h, :], X[..., h:, :]
        L1, B, L2 = self._blocks
        return torch.cat([product(L1, x1), B @ x1 + product(L2, x2)], -2)

    def apply_transpose(self, X: Tensor) -> Tensor:
        """``[L1^T x1 + B^T x2, L2^T x2]``."""
        if self._is_small:
            return self.to_dense().mT @ X
        h = self.R.shape[-1]
        x1, x2 = X[..., :h, :], X[..., h:, :]
        L1, B, L2 = self._blocks
        return torch.cat([adjoint(L1, x1) + B.mT @ x2, adjoint(L2, x2)], -2)

    def orthogonal_project(self, M: Tensor) -> Self:
        """The lower triangle of ``M [..., n, n]``."""
        if self._is_small:
            return self._build([folded.fold(M)])
        h = self.R.shape[-1]
        return self._fold(self._below(M[..., :h]), M[..., h:, h:].mT.clone())

    def gram(self) -> Self:
        """``Pi(A^T A)``, half the work of a dense product."""
        if self._is_small:
            L = self.to_dense()
            return self._build([folded.fold_twice(L.mT @ L)])
        _, B, L2 = self._blocks
        columns, L2 = self._columns, L2.tril()
        first = torch.cat([columns.mT @ columns, L2.mT @ B], -2)
        return self._fold_twice(self._below(first).mul_(2), 2 * (L2.mT @ L2))

    def _outer(self) -> Self:
        """``Pi(A A^T)``, half the work of a dense product."""
        if self._is_small:
            L = self.to_dense()
            return self._build([folded.fold_twice(L @ L.mT)])
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

    def solve_transpose(self, X: Tensor) -> Tensor:
        """``A^{-T} X``, back substitution."""
        self._check_pivots()
        h, wide = self.R.shape[-1], at_least_float32(X.dtype)
        L1, B, L2 = (block.to(wide) for block in self._blocks)
        y1, y2 = X[..., :h, :].to(wide), X[..., h:, :].to(wide)
        x2 = solve_triangular(L2.mT, y2, upper=True)
        x1 = solve_triangular(L1.mT, y1 - B.mT @ x2, upper=True)
        return torch.cat([x1, x2], -2).to(X.dtype)


class UpperTriangular(Triangular):
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
        return self.mT.solve_transpose(X)

    def inverse(self) -> Self:
        """As of the lower form."""
        return self._build([self.mT.inverse().R])
