"""What lower and upper triangular matrices share: one rectangle with a place for each number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Size, Tensor
from torch.nn.functional import pad

from structured._core.checks import check_pivots
from structured._core.matrix import Scalar, StructuredMatrix
from structured._core.numbers import add_to_diagonal, largest, trailing
from structured._products.in_place import plain
from structured._products.triangular import tril_, write_gram
from structured._transforms import folded


class Triangular(StructuredMatrix):
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
    def _is_small(self) -> bool:
        """Whether it is multiplied as a dense matrix; compiled code joins its steps by itself."""
        n = self.n
        small = self.R.is_cpu and 0 < n <= folded.SMALL
        return small and not torch.compiler.is_compiling()

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
        if self._is_small:
            return self._build([folded.fold_twice(S)])
        h = self.R.shape[-1]
        return self._fold_twice(self._below(S[..., :h]).mul_(2), 2 * S[..., h:, h:])

    def project_gram(self, X: Tensor) -> Self:
        """The triangle of ``X X^T``, twice off the diagonal; at most 3/4 n^2 a column."""
        if self._is_small:
            return self._build([folded.fold_twice(X @ X.mT)])
        n, h, shift, batch = self.n, self.R.shape[-1], self._shift, X.shape[:-2]
        R, U = X.new_empty(*batch, n + shift, h), X.new_empty(*batch, n - h, n - h)
        write_gram(R[..., shift:, :], X)
        write_gram(U.mT, X[..., h:, :])
        return self._fold_twice(R, U)

    def orthogonal_project_gram(self, X: Tensor) -> Self:
        """The same triangle, once."""
        if self._is_small:
            return self._build([folded.fold(X @ X.mT)])
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
