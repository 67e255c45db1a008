"""Kronecker products: an operator, not a structure, for they are no linear space.

::

    C (x) K        the numbers of C and of K
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Size, Tensor

from structured._core.checks import check_columns
from structured._core.matrix import Operator


@dataclass(frozen=True, eq=False)
class Kronecker(Operator):
    """``C (x) K``; its product with ``vec(G)``, the rows of ``G`` in turn, is ``C G K^T``."""

    C: Operator  # [..., p, p]
    K: Operator  # [..., q, q]

    def __post_init__(self) -> None:
        C, K = self.C, self.K
        if (C.batch_shape, C.dtype, C.device) != (K.batch_shape, K.dtype, K.device):
            raise ValueError(
                "Kronecker: expected factors of one batch shape, dtype and device, got "
                f"{list(C.batch_shape)}, {C.dtype}, {C.device} and "
                f"{list(K.batch_shape)}, {K.dtype}, {K.device}"
            )

    @property
    def shape(self) -> Size:
        """``[..., p q, p q]``."""
        size = self.C.n * self.K.n
        return Size((*self.C.batch_shape, size, size))

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the factors."""
        return self.C.dtype

    @property
    def device(self) -> torch.device:
        """Device of the factors."""
        return self.C.device

    @property
    def mT(self) -> Kronecker:
        """``C^T (x) K^T``."""
        return Kronecker(self.C.mT, self.K.mT)

    def apply_matrix(self, G: Tensor) -> Tensor:
        """``C G K^T`` for ``G [..., p, q]``."""
        return self.C.apply_overwriting(self.K.apply(G.mT).mT)

    def apply_apart(self, G: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """``C [G g] K^T`` for columns in two parts, the result in the same two."""
        Y, y = self.K.apply_rows(G.mT, g.mT)
        return self.C.apply_overwriting(Y.mT), self.C.apply_overwriting(y.mT)

    def apply(self, X: Tensor) -> Tensor:
        """``(C (x) K) X`` for ``X [..., p q, m]``."""
        check_columns(self, X, "apply")
        p, q, m = self.C.n, self.K.n, X.shape[-1]
        Y = self.K.apply(X.unflatten(-2, (p, q)).movedim(-3, -2).flatten(-2))  # [..., q, p m]
        Y = self.C.apply(Y.unflatten(-1, (p, m)).movedim(-2, -3).flatten(-2))  # [..., p, q m]
        return Y.unflatten(-1, (q, m)).flatten(-3, -2)

    def apply_transpose(self, X: Tensor) -> Tensor:
        """``(C (x) K)^T X`` for ``X [..., p q, m]``."""
        return self.mT.apply(X)

    def to_dense(self) -> Tensor:
        """Write the product out."""
        C, K = self.C.to_dense(), self.K.to_dense()
        return torch.einsum("...ij,...kl->...ikjl", C, K).reshape(self.shape)

    def __repr__(self) -> str:
        return f"{self.C!r} (x) {self.K!r}"
