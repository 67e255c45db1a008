"""What a member has besides products and projections: inverses, powers, numbers.

As in :mod:`structured._core.matrix`, everything has a default through ``to_dense``.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Self

import torch
from torch import Tensor

from structured._core.checks import check_arguments
from structured._core.closed import read
from structured._core.exponential import can_be_counted, exponential
from structured._core.member import Member, Scalar
from structured._core.numbers import at_least_float32, solve_dense
from structured._core.wide import round_once


class Algebra(Member):
    """Members with inverses, powers and numbers."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """Write the member out, ``[..., n, n]``, linearly in the stored tensors."""

    def add_scaled_identity(self, alpha: Scalar) -> Self:
        """``A + alpha I`` for a number or a tensor ``alpha`` of the batch shape."""
        eye = torch.eye(self.n, dtype=self.dtype, device=self.device)
        return self + alpha * read(self, eye.expand(self.shape))

    def solve(self, X: Tensor) -> Tensor:
        """``A^{-1} X`` for ``X [..., n, m]`` or ``[n]``; solved in float32 at least.

        Of a member of the same structure, a member: :meth:`solve_member`.

        As of :func:`torch.linalg.solve`, only an exact zero among the pivots counts as singular.
        The error needs the numbers: on a GPU it waits for them, on meta nothing is known.

        Raises:
            RuntimeError: If ``A`` is singular (``torch.linalg.LinAlgError``).
        """
        return solve_dense(self.to_dense(), X)

    def solve_transpose(self, X: Tensor) -> Tensor:
        """``A^{-T} X``.

        Raises:
            RuntimeError: If ``A`` is singular (``torch.linalg.LinAlgError``).
        """
        return solve_dense(self.to_dense().mT, X)

    # Inverses and powers ------------------------------------------------------------------------

    def inverse(self) -> Self:
        """``A^{-1}``, a member: an algebra of matrices holds the inverses of its members.

        Raises:
            RuntimeError: If ``A`` is singular (``torch.linalg.LinAlgError``).
        """
        eye = torch.eye(self.n, dtype=self.dtype, device=self.device)
        return read(self, self.solve(eye.expand(self.shape)))

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
        return read(self, torch.linalg.matrix_exp(dense).to(self.dtype))

    def _exp_by_products(self) -> Self:
        """The same, for structures whose products cost less than those of dense matrices.

        Compiled, and within transforms such as ``vmap``, by the dense matrix: how many products it
        takes depends on the numbers.
        """
        if not self.n:
            return self.clone()
        wide = self.to(at_least_float32(self.dtype))
        mean = wide.trace() / self.n
        if not can_be_counted(mean):
            return Algebra.exp(self)
        norm = wide.add_scaled_identity(-mean).frobenius_norm()
        return exponential(wide, mean, norm).to(self.dtype)

    # Numbers ------------------------------------------------------------------------------------

    def trace_product(self, other: Self) -> Tensor:
        """``tr(A B)`` of two members of one structure, ``[...]``."""
        return self.matmul(other).trace()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_arguments(cls)
        round_once(cls)


check_arguments(Algebra)  # the defaults check as well
