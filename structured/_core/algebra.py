"""What a member has besides products and projections: inverses, powers, numbers.

As in :mod:`structured._core.matrix`, everything has a default through ``to_dense``.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Self

import torch
from torch import Tensor

from structured._core.checks import check_arguments
from structured._core.exponential import exponential
from structured._core.member import Member
from structured._core.numbers import at_least_float32, largest, largest_singular_value


class Algebra(Member):
    """Members with inverses, powers and numbers."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """Write the member out, ``[..., n, n]``, linearly in the stored tensors."""

    @abstractmethod
    def solve(self, X: Tensor) -> Tensor:
        """``A^{-1} X`` for ``X [..., n, m]``."""

    # Inverses and powers ------------------------------------------------------------------------

    def inverse(self) -> Self:
        """``A^{-1}``, a member: an algebra of matrices holds the inverses of its members.

        Raises:
            RuntimeError: If ``A`` is singular (``torch.linalg.LinAlgError``).
        """
        eye = torch.eye(self.n, dtype=self.dtype, device=self.device)
        return self.orthogonal_project(self.solve(eye.expand(self.shape)))

    def solve_member(self, other: Self) -> Self:
        """``A^{-1} B`` for two members of one structure; what ``A.solve(B)`` calls."""
        return self.inverse().matmul(other)

    def __pow__(self, k: int) -> Self:
        """``A^k`` for an integer ``k``, by squaring; a negative one takes powers of the inverse."""
        if not isinstance(k, int) or isinstance(k, bool):
            return NotImplemented
        if k < 0:
            return self.inverse() ** -k
        power, square = None, self
        while k:
            if k & 1:
                power = square if power is None else power.matmul(square)
            k >>= 1
            square = square.matmul(square) if k else square
        if power is None:
            return self.zeros_like().add_scaled_identity(1.0)
        return power.clone() if power is self else power

    def exp(self) -> Self:
        """``exp(A) = I + A + A^2 / 2 + ...``, a member; in float32 at least."""
        dense = self.to_dense().to(at_least_float32(self.dtype))
        return self.orthogonal_project(torch.linalg.matrix_exp(dense).to(self.dtype))

    def _exp_by_products(self) -> Self:
        """The same, for structures whose products cost less than those of dense matrices."""
        if not self.n:
            return self.clone()
        wide = self.to(at_least_float32(self.dtype))
        mean = wide.trace() / self.n
        norm = wide.add_scaled_identity(-mean).frobenius_norm()
        return exponential(wide, mean, norm).to(self.dtype)

    # Numbers ------------------------------------------------------------------------------------

    def diagonal(self) -> Tensor:
        """The diagonal, ``[..., n]``."""
        return self.to_dense().diagonal(dim1=-2, dim2=-1).clone()

    def trace(self) -> Tensor:
        """Sum of the diagonal, ``[...]``."""
        return self.diagonal().sum(-1)

    def trace_product(self, other: Self) -> Tensor:
        """``tr(A B)`` of two members of one structure, ``[...]``."""
        return self.matmul(other).trace()

    def logdet(self) -> Tensor:
        """``log |det A|``, ``[...]``."""
        wide = at_least_float32(self.dtype)
        return torch.linalg.slogdet(self.to_dense().to(wide)).logabsdet.to(self.dtype)

    def max_abs(self) -> Tensor:
        """Largest absolute entry, ``[...]``; zero for ``n = 0``."""
        return largest(self.to_dense(), len(self.batch_shape))

    def spectral_norm(self) -> Tensor:
        """Largest singular value, ``[...]``, in float32 at least; zero for ``n = 0``."""
        return largest_singular_value(self.to_dense())

    def frobenius_norm(self) -> Tensor:
        """Square root of the sum of all squared entries, ``[...]``."""
        return torch.linalg.matrix_norm(self.to_dense())

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_arguments(cls)


check_arguments(Algebra)  # the defaults check as well
