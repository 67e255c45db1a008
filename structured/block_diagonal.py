"""Block-diagonal matrices with equal blocks and a smaller last one.

::

    a b . . .
    c d . . .
    . . e f .        k n numbers, products O(k^2 n)
    . . g h .
    . . . . i
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Size, Tensor

from structured._core.dispatch import symmetric_product
from structured._core.matrix import Scalar, StructuredMatrix, joint_norm, largest
from structured._core.numbers import largest_singular_value
from structured._products.in_place import add_product_, plain, write_product_
from structured.dense import Dense

_SMALL = 1 << 16  # numbers of X; up to here parts are joined faster than written (measured)


class BlockDiagonal(StructuredMatrix):
    """Blocks of size ``k`` along the diagonal, the last of size ``n mod k``.

    Stores about k n numbers; ``A X`` costs k n a column.
    """

    blocks: Tensor  # [..., n // k, k, k]
    last: Tensor  # [..., n % k, n % k]

    dimensions = ("count k k", "rest rest")

    closed_under_transpose = True

    @classmethod
    def zeros(cls, n: int, k: int, *, batch_shape: Sequence[int] = (), **opts: Any) -> Self:
        """The zero matrix of size ``n`` with blocks of size ``k``.

        Raises:
            ValueError: If ``k`` is not a positive integer.
        """
        if not isinstance(k, int) or k < 1:
            raise ValueError(f"block_diagonal(k): expected an integer k >= 1, got {k!r}")
        count, rest = divmod(n, k)
        return cls(
            torch.zeros(*batch_shape, count, k, k, **opts),
            torch.zeros(*batch_shape, rest, rest, **opts),
        )

    def to_dense(self) -> Tensor:
        """The blocks on the diagonal of zeros."""
        count, k = self.blocks.shape[-3:-1]
        # [..., k, k, count, count] -> [..., count, k, count, k]
        spread = torch.diag_embed(self.blocks.movedim(-3, -1)).permute(
            *range(self.blocks.ndim - 3), -2, -4, -1, -3
        )
        full = spread.reshape(*self.last.shape[:-2], count * k, count * k)
        rest = self.last.shape[-1]
        top = torch.nn.functional.pad(full, (0, rest))
        return torch.cat([top, torch.nn.functional.pad(self.last, (count * k, 0))], -2)

    @property
    def shape(self) -> Size:
        """``[..., n, n]``."""
        n = self._head + self.last.shape[-1]
        return Size((*self.last.shape[:-2], n, n))

    @property
    def _head(self) -> int:
        """Rows covered by the equal blocks."""
        return self.blocks.shape[-3] * self.blocks.shape[-1]

    def _split(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of ``X`` by block: ``[..., n // k, k, m]`` and ``[..., n % k, m]``."""
        h, (count, k) = self._head, self.blocks.shape[-3:-1]
        return X[..., :h, :].reshape(*X.shape[:-2], count, k, X.shape[-1]), X[..., h:, :]

    def _products(self, blocks: Tensor, last: Tensor, X: Tensor) -> Tensor:
        """Blocks times their rows of ``X [..., n, m]``, written side by side."""
        if not plain(blocks, last, X):
            head, rest = self._split(X)
            return torch.cat([(blocks @ head).flatten(-3, -2), last @ rest], -2)
        if X.is_cpu and X.stride(-1) == 1 and (not last.shape[-1] or X.numel() <= _SMALL):
            head, rest = self._split(X)  # one product is the result, or joined to a short one
            product = (blocks @ head).flatten(-3, -2)
            return torch.cat([product, last @ rest], -2) if last.shape[-1] else product
        Y, h = self._empty_like(X), self._head
        self._head_product_(Y, blocks, X)
        add_product_(Y[..., h:, :], last, X[..., h:, :], beta=0.0)
        return Y

    def _empty_like(self, X: Tensor) -> Tensor:
        """Room for a product with ``X``, laid out as it is."""
        if X.shape[:-2] == self.batch_shape:
            return torch.empty_like(X)
        return X.new_empty(*torch.broadcast_shapes(self.batch_shape, X.shape[:-2]), *X.shape[-2:])

    def _head_product_(self, Y: Tensor, blocks: Tensor, X: Tensor) -> None:
        """Write the products of the equal blocks into the first rows of ``Y``."""
        h, sizes = self._head, blocks.shape[-3:-1]
        Y, X = (t[..., :h, :].unflatten(-2, sizes) for t in (Y, X))
        write_product_(Y, blocks, X)

    @property
    def mT(self) -> BlockDiagonal:
        """Every block transposed."""
        return BlockDiagonal(self.blocks.mT, self.last.mT)

    def matmul(self, other: Self) -> Self:
        """Block by block."""
        return self._build([self.blocks @ other.blocks, self.last @ other.last])

    def apply(self, X: Tensor) -> Tensor:
        """Block by block, k n a column."""
        return self._products(self.blocks, self.last, X)

    def apply_overwriting(self, X: Tensor) -> Tensor:
        """Written over ``X``."""
        if X.shape[:-2] != self.batch_shape or not plain(X, self.blocks, self.last):
            return self.apply(X)
        h, sizes = self._head, self.blocks.shape[-3:-1]
        rows = X[..., :h, :].unflatten(-2, sizes)
        write_product_(rows, self.blocks, rows)
        if h < X.shape[-2]:
            X[..., h:, :] = self.last @ X[..., h:, :]
        return X

    rows_apart = True

    def apply_rows(self, X: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Only the rows of the last block are joined."""
        h, s = self._head, X.shape[-2]
        if s < h or not plain(X, x, self.blocks, self.last):
            return super().apply_rows(X, x)
        Y = self._empty_like(X)
        self._head_product_(Y, self.blocks, X)
        end = self.last @ torch.cat([X[..., h:, :], x], -2)
        Y[..., h:, :] = end[..., : s - h, :]
        return Y, end[..., s - h :, :]

    def apply_transpose(self, X: Tensor) -> Tensor:
        """Block by block, k n a column."""
        return self._products(self.blocks.mT, self.last.mT, X)

    def orthogonal_project(self, M: Tensor) -> Self:
        """The diagonal blocks of ``M [..., n, n]``."""
        h, sizes = self._head, self.blocks.shape[-3:-1]
        grid = M[..., :h, :h].unflatten(-1, sizes).unflatten(-3, sizes)
        blocks = grid.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        return self._build([blocks.clone(), M[..., h:, h:].clone()])

    def project(self, S: Tensor) -> Self:
        """The diagonal blocks of ``S [..., n, n]``."""
        return self.orthogonal_project(S)

    def project_gram(self, X: Tensor) -> Self:
        """``X_b X_b^T`` for every block of rows, k n a column."""
        head, last = self._split(X)
        return self._build([symmetric_product(head), symmetric_product(last)])

    def gram(self) -> Self:
        """Block by block."""
        return self._build([symmetric_product(self.blocks.mT), symmetric_product(self.last.mT)])

    def exp(self) -> Self:
        """Block by block, k^2 n."""
        return self._build([Dense(self.blocks).exp().M, Dense(self.last).exp().M])

    def diagonal(self) -> Tensor:
        """Those of the blocks."""
        blocks, last = (t.diagonal(dim1=-2, dim2=-1) for t in self.tensors())
        return torch.cat([blocks.flatten(-2), last], -1)

    def trace(self) -> Tensor:
        """Sum of the traces of the blocks."""
        blocks = self.blocks.diagonal(dim1=-2, dim2=-1).sum((-2, -1))
        return blocks + self.last.diagonal(dim1=-2, dim2=-1).sum(-1)

    def trace_product(self, other: Self) -> Tensor:
        """Sum over the blocks, k n."""
        blocks = Dense(self.blocks).trace_product(Dense(other.blocks)).sum(-1)
        return blocks + Dense(self.last).trace_product(Dense(other.last))

    def add_scaled_identity(self, alpha: Scalar) -> Self:
        """Block by block."""
        each = alpha[..., None] if isinstance(alpha, Tensor) and alpha.ndim else alpha
        if isinstance(each, Tensor) and each.ndim:
            each = each.expand(self.blocks.shape[:-2])
        blocks, last = Dense(self.blocks), Dense(self.last)
        return self._build([blocks.add_scaled_identity(each).M, last.add_scaled_identity(alpha).M])

    def solve(self, X: Tensor) -> Tensor:
        """Block by block, k^2 n once and k n a column."""
        head, last = self._split(X)
        solved = Dense(self.blocks).solve(head).flatten(-3, -2)
        return torch.cat([solved, Dense(self.last).solve(last)], -2)

    def inverse(self) -> Self:
        """Block by block, k^2 n."""
        return self._build([Dense(self.blocks).inverse().M, Dense(self.last).inverse().M])

    def solve_member(self, other: Self) -> Self:
        """Block by block, each by one factorization."""
        blocks = Dense(self.blocks).solve_member(Dense(other.blocks))
        return self._build([blocks.M, Dense(self.last).solve_member(Dense(other.last)).M])

    def logdet(self) -> Tensor:
        """Sum over the blocks."""
        return Dense(self.blocks).logdet().sum(-1) + Dense(self.last).logdet()

    def max_abs(self) -> Tensor:
        """Largest absolute entry."""
        batch = self.last.ndim - 2
        return torch.maximum(largest(self.blocks, batch), largest(self.last, batch))

    def spectral_norm(self) -> Tensor:
        """The largest of the blocks', k^2 n."""
        blocks, last = (largest_singular_value(t) for t in self.tensors())
        return torch.cat([blocks, last[..., None]], -1).amax(-1)

    def frobenius_norm(self) -> Tensor:
        """Square root of the sum of all squared entries."""
        return joint_norm(
            torch.linalg.vector_norm(self.blocks, dim=(-3, -2, -1)),
            torch.linalg.vector_norm(self.last, dim=(-2, -1)),
        )
