"""Hierarchical matrices: full rows in front and at the end, a diagonal between them.

::

    a a a a a
    . b . . .
    . . b . .        k1 = 1, k2 = 2: (k1 + k2 + 1) n numbers, products O((k1 + k2)^2 n)
    . c c c c
    . c c c c

Let ``V [k, n]`` be the full rows, the columns of ``J [n, k]`` those of the identity at their places
and ``D`` the diagonal, zero there. Then ``A = D + J V``. As ``D J = 0`` and ``J^T J = I``, every
operation is one pass with the diagonal and products of width ``k = k1 + k2``::

    A X   = D X + J (V X)          A B   = D_A D_B + J (V_A D_B + (V_A J) V_B)
    A^T X = D X + V^T (J^T X)      A^T A = D^2 + V^T V
                                   A A^T = D^2 + J V D + D V^T J^T + J V V^T J^T
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Size, Tensor
from torch.nn.functional import pad

from structured._core.arrow import Arrow, at_ends
from structured._core.checks import check_pivots
from structured._core.dispatch import sums_of_squares
from structured._core.matrix import (
    Scalar,
    StructuredMatrix,
    add_to_diagonal,
    at_least_float32,
    joint_norm,
    largest,
)
from structured._products.in_place import plain, plus_product
from structured.dense import Dense


class Hierarchical(StructuredMatrix):
    """Full rows, a diagonal, and full rows but for the first columns, from top to bottom.

    The same as ``block_upper(dense, block_lower(diagonal, dense, -k2), k1)``. Stores about
    (k1 + k2 + 1) n numbers; ``A X`` costs as many a column.

    Source: Lin et al., arXiv 2312.05705, "hierarchical" structure.
    """

    top: Tensor  # [..., k1, n]
    d: Tensor  # [..., n - k1 - k2]
    bottom: Tensor  # [..., k2, n - k1]

    dimensions = ("k1 n", "middle", "k2 rest")

    def __post_init__(self) -> None:
        super().__post_init__()
        (k1, n), (k2, rest) = self.top.shape[-2:], self.bottom.shape[-2:]
        if (rest, self.d.shape[-1]) != (n - k1, n - k1 - k2):
            raise ValueError(
                "Hierarchical: expected shapes [..., k1, n], [..., n - k1 - k2], "
                f"[..., k2, n - k1], got {[list(t.shape) for t in self.tensors()]}"
            )

    @classmethod
    def zeros(
        cls, n: int, k1: int, k2: int, *, batch_shape: Sequence[int] = (), **opts: Any
    ) -> Self:
        """The zero matrix of size ``n`` with at most ``k1`` full rows first and ``k2`` last.

        Raises:
            ValueError: If ``k1`` or ``k2`` is not a positive integer.
        """
        for k in (k1, k2):
            if not isinstance(k, int) or isinstance(k, bool) or k < 1:
                raise ValueError(f"hierarchical(k1, k2): expected integers >= 1, got {k!r}")
        k1 = min(k1, n)
        k2 = min(k2, n - k1)
        return cls(
            torch.zeros(*batch_shape, k1, n, **opts),
            torch.zeros(*batch_shape, n - k1 - k2, **opts),
            torch.zeros(*batch_shape, k2, n - k1, **opts),
        )

    def to_dense(self) -> Tensor:
        """``[top; 0 diag(d) 0; 0 bottom]``."""
        k1, k2 = self._sizes
        middle = pad(torch.diag_embed(self.d), (k1, k2))
        return torch.cat([self.top, middle, pad(self.bottom, (k1, 0))], -2)

    @property
    def shape(self) -> Size:
        """``[..., n, n]``."""
        n = self.top.shape[-1]
        return Size((*self.top.shape[:-2], n, n))

    @property
    def _sizes(self) -> tuple[int, int]:
        """``(k1, k2)``, clipped to n."""
        return self.top.shape[-2], self.bottom.shape[-2]

    @property
    def _rows(self) -> Tensor:
        """``V``, the full rows, ``[..., k, n]``."""
        return torch.cat([self.top, pad(self.bottom, (self.top.shape[-2], 0))], -2)

    @property
    def _diagonal(self) -> Tensor:
        """The diagonal of ``D``, ``[..., n]``."""
        return pad(self.d, self._sizes)

    def _middle(self, t: Tensor) -> Tensor:
        """The columns of ``t [..., n]`` that meet the diagonal."""
        return t.narrow(-1, self.top.shape[-2], self.d.shape[-1])

    def _with(self, d: Tensor, V: Tensor) -> Self:
        """The member with this diagonal and these full rows."""
        k1 = self.top.shape[-2]
        return self._build([V[..., :k1, :], d, V[..., k1:, k1:]])

    def _projected(self, d: Tensor, V: Tensor) -> Self:
        """``Pi`` of the symmetric matrix with this diagonal and these full rows."""
        k1, k2 = self._sizes
        V = V + V
        V[..., :k1, :k1].mul_(0.5)
        V[..., k1:, V.shape[-1] - k2 :].mul_(0.5)
        return self._with(d, V)

    def matmul(self, other: Self) -> Self:
        """``D_A D_B + J (V_A D_B + (V_A J) V_B)``."""
        V = self._rows
        scaled = V * other._diagonal[..., None, :]
        product = plus_product(scaled, at_ends(V, *self._sizes, -1), other._rows)
        return self._with(self.d * other.d, product)

    def apply(self, X: Tensor) -> Tensor:
        """``D X + J (V X)``."""
        k1, k2 = self._sizes
        Z = self._rows @ X
        if not plain(X, *self.tensors()):
            middle = self.d[..., None] * X.narrow(-2, k1, self.d.shape[-1])
            return torch.cat([Z[..., :k1, :], middle, Z[..., k1:, :]], -2)
        Y = self._diagonal[..., None] * X
        Y[..., :k1, :] = Z[..., :k1, :]
        Y[..., Y.shape[-2] - k2 :, :] = Z[..., k1:, :]
        return Y

    def apply_transpose(self, X: Tensor) -> Tensor:
        """``D X + V^T (J^T X)``."""
        return plus_product(self._diagonal[..., None] * X, self._rows.mT, at_ends(X, *self._sizes))

    def orthogonal_project(self, M: Tensor) -> Self:
        """The rows and the diagonal of ``M [..., n, n]``."""
        d = self._middle(M.diagonal(dim1=-2, dim2=-1))
        return self._with(d.clone(), at_ends(M, *self._sizes))

    def project(self, S: Tensor) -> Self:
        """The rows and the diagonal of ``S [..., n, n]``, twice what has no mirror image."""
        d = self._middle(S.diagonal(dim1=-2, dim2=-1))
        return self._projected(d.clone(), at_ends(S, *self._sizes))

    def project_gram(self, X: Tensor) -> Self:
        """``J^T X X^T`` and sums of squares, (k1 + k2 + 1) n a column."""
        middle = X.narrow(-2, self.top.shape[-2], self.d.shape[-1])
        return self._projected(sums_of_squares(middle), at_ends(X, *self._sizes) @ X.mT)

    def orthogonal_project_gram(self, X: Tensor) -> Self:
        """The same rows and diagonal, once."""
        middle = X.narrow(-2, self.top.shape[-2], self.d.shape[-1])
        return self._with(sums_of_squares(middle), at_ends(X, *self._sizes) @ X.mT)

    def gram(self) -> Self:
        """``Pi(D^2 + V^T V)``."""
        V = self._rows
        d = self.d.square() + self._middle(V.square().sum(-2))
        return self._projected(d, at_ends(V, *self._sizes, -1).mT @ V)

    closed_under_congruence = True

    def congruence(self, U: Self) -> Self:
        """The rows ``J^T A^T S A = (V J)^T (Q D + Q J V)``, with ``Q = J^T S``; (k1 + k2)^2 n.

        And on the diagonal, ``D S D + 2 D V^T Q + V^T Q J V``.
        """
        V, Q, D = self._rows, U._symmetric_rows(), self._diagonal
        QJV = at_ends(Q, *self._sizes, -1) @ V
        mixed, own = self._middle((V * Q).sum(-2)), self._middle((V * QJV).sum(-2))
        d = self.d * (self.d * U.d + 2 * mixed) + own
        corner = at_ends(V, *self._sizes, -1)
        return self._projected(d, corner.mT @ torch.addcmul(QJV, Q, D[..., None, :]))

    def _symmetric_rows(self) -> Tensor:
        """``J^T S``, the full rows of the symmetric matrix ``S`` that :meth:`_projected` saw."""
        k1, k2 = self._sizes
        Q, n = 0.5 * self._rows, self.top.shape[-1]
        Q[..., :k1, :k1].mul_(2)
        Q[..., k1:, n - k2 :].mul_(2)
        Q[..., k1:, :k1] = Q[..., :k1, n - k2 :].mT
        return Q

    def _outer_rows(self) -> Tensor:
        """``J^T A A^T = V D + V V^T J^T``, the full rows of ``A A^T``, ``[..., k, n]``."""
        k1, k2 = self._sizes
        V, n = self._rows, self.top.shape[-1]
        W, square = V * self._diagonal[..., None, :], V @ V.mT
        W[..., :k1] = square[..., :k1]
        W[..., n - k2 :] = square[..., k1:]
        return W

    def _outer(self) -> Self:
        """``Pi(A A^T)``."""
        return self._projected(self.d.square(), self._outer_rows())

    def squared_rows(self) -> Tensor:
        """Those of the full rows about ``d^2``."""
        first, last = (t.square().sum(-1) for t in (self.top, self.bottom))
        return torch.cat([first, self.d.square(), last], -1)

    def _squared_columns(self) -> Tensor:
        """``D^2`` and those of ``V``."""
        return self._diagonal.square() + self._rows.square().sum(-2)

    def outer(self) -> Arrow:
        """``A A^T``, applied at half the cost of ``A`` and ``A^T`` in turn."""
        return Arrow(pad(self.d.square(), self._sizes), self._outer_rows(), self._sizes[0])

    def exp(self) -> Self:
        """By products, k^2 n each."""
        return self._exp_by_products()

    def diagonal(self) -> Tensor:
        """Those of the full rows about ``d``."""
        first = self.top.diagonal(dim1=-2, dim2=-1)
        last = self.bottom.diagonal(self.d.shape[-1], -2, -1)
        return torch.cat([first, self.d, last], -1)

    def add_scaled_identity(self, alpha: Scalar) -> Self:
        """Add to the diagonal."""
        each = alpha[..., None] if isinstance(alpha, Tensor) and alpha.ndim else alpha
        top = add_to_diagonal(self.top, alpha)
        bottom = add_to_diagonal(self.bottom, alpha, self.d.shape[-1])
        return self._build([top, (self.d + each).to(self.d.dtype), bottom])

    def solve(self, X: Tensor) -> Tensor:
        """Divide by ``d``, then solve for the full rows.

        Raises:
            RuntimeError: If ``A`` is singular (``torch.linalg.LinAlgError``).
        """
        return self._solve(X, transpose=False)

    def solve_transpose(self, X: Tensor) -> Tensor:
        """``A^{-T} X``, the other way about."""
        return self._solve(X, transpose=True)

    def _solve(self, Y: Tensor, *, transpose: bool) -> Tensor:
        check_pivots(self.d)
        k1, V, d = self._sizes[0], self._rows, self.d[..., None]
        corner, across = Dense(at_ends(V, *self._sizes, -1)), self._middle(V)
        y, ends = Y.narrow(-2, k1, d.shape[-2]), at_ends(Y, *self._sizes)
        if transpose:
            ends = corner.mT.solve(ends)
            x = (y - across.mT @ ends) / d
        else:
            x = y / d
            ends = corner.solve(ends - across @ x)
        return torch.cat([ends[..., :k1, :], x, ends[..., k1:, :]], -2)

    def inverse(self) -> Self:
        """``D^+`` and the full rows ``(V J)^{-1} (J^T - V D^+)``; k^2 n.

        Raises:
            RuntimeError: If ``A`` is singular (``torch.linalg.LinAlgError``).
        """
        check_pivots(self.d)
        k1, k2 = self._sizes
        wide = self.to(at_least_float32(self.dtype))
        corner = torch.linalg.inv(at_ends(wide._rows, k1, k2, -1))
        across = corner @ (wide._middle(wide._rows) / -wide.d[..., None, :])
        rows = torch.cat([corner[..., :k1], across, corner[..., k1:]], -1)
        return self._with(1 / self.d, rows.to(self.dtype))

    def logdet(self) -> Tensor:
        """``log|det(V J)|`` and the sum of ``log |d|``."""
        corner = Dense(at_ends(self._rows, *self._sizes, -1))
        return corner.logdet() + self.d.abs().log().sum(-1)

    def max_abs(self) -> Tensor:
        """Largest absolute entry."""
        batch = self.d.ndim - 1
        top, d, bottom = (largest(t, batch) for t in self.tensors())
        return torch.maximum(torch.maximum(top, d), bottom)

    def frobenius_norm(self) -> Tensor:
        """Square root of the sum of all squared entries."""
        norms = (torch.linalg.vector_norm(t, dim=(-2, -1)) for t in (self.top, self.bottom))
        return joint_norm(*norms, torch.linalg.vector_norm(self.d, dim=-1))
