"""Operators of ``linear_operator`` that presume nothing about symmetry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, Self

import torch
from linear_operator.operators import (
    DenseLinearOperator,
    LinearOperator,
    MatmulLinearOperator,
    RootLinearOperator,
    SumLinearOperator,
)
from torch import Size, Tensor

from structured._core.matrix import StructuredMatrix
from structured._core.numbers import solve_dense
from structured.kronecker import Kronecker


class Direct(LinearOperator):
    """What both operators share: everything that needs an inverse, from a direct solve."""

    def _direct_solve(self, X: Tensor) -> Tensor:
        raise NotImplementedError

    def solve(self, right_tensor: Tensor, left_tensor: Tensor | None = None) -> Tensor:
        if right_tensor.ndim == 1:
            solution = self._direct_solve(right_tensor[:, None])[..., 0]
        else:
            solution = self._direct_solve(right_tensor)
        return solution if left_tensor is None else left_tensor @ solution

    def _solve(
        self, rhs: Tensor, preconditioner: Any = None, num_tridiag: int | None = 0
    ) -> Tensor | tuple[Tensor, Tensor]:
        if num_tridiag:  # asked for the tridiagonal matrices of conjugate gradients themselves
            return super()._solve(rhs, preconditioner, num_tridiag)
        return self.solve(rhs)

    def inv_quad(self, inv_quad_rhs: Tensor, reduce_inv_quad: bool = True) -> Tensor:
        columns = inv_quad_rhs[:, None] if inv_quad_rhs.ndim == 1 else inv_quad_rhs
        terms = (columns * self._direct_solve(columns)).sum(-2)
        return terms.sum(-1) if reduce_inv_quad else terms

    def inv_quad_logdet(
        self,
        inv_quad_rhs: Tensor | None = None,
        logdet: bool | None = False,
        reduce_inv_quad: bool | None = True,
    ) -> tuple[Tensor, Tensor]:
        nothing = torch.zeros(self.batch_shape, dtype=self.dtype, device=self.device)
        quad = nothing
        if inv_quad_rhs is not None:
            quad = self.inv_quad(inv_quad_rhs, bool(reduce_inv_quad))
        return quad, self.logdet() if logdet else nothing


class _Unsymmetric(Direct):
    """An operator that need not be symmetric, nor what is made out of it."""

    def __add__(self, other: Any) -> Any:
        if isinstance(other, RootLinearOperator):  # whose sums are decomposed
            return _General(SumLinearOperator(self, other))
        total = super().__add__(other)
        return total if total is self else _General(total)

    def add_diagonal(self, diag: Tensor) -> LinearOperator:
        return _General(super().add_diagonal(diag))

    def matmul(self, other: Any) -> Any:
        if isinstance(other, LinearOperator):
            return _General(MatmulLinearOperator(self, other))
        return super().matmul(other)

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> LinearOperator:
        taken = super()._getitem(row_index, col_index, *batch_indices)
        return taken if isinstance(taken, _Unsymmetric) else _General(taken)

    def repeat(self, *sizes: Any) -> LinearOperator:
        return _General(super().repeat(*sizes))

    def _mul_matrix(self, other: Any) -> LinearOperator:
        return _General(DenseLinearOperator(self.to_dense() * other.to_dense()))

    def _sum_batch(self, dim: int) -> LinearOperator:
        return _General(super()._sum_batch(dim))

    def _needs_symmetry(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"{self!r} is not known to be symmetric; "
            "to_root_linear_operator(K) is the positive definite K K^T"
        )

    _cholesky = _symeig = _needs_symmetry
    diagonalization = add_low_rank = root_decomposition = root_inv_decomposition = _needs_symmetry
    sqrt_inv_matmul = zero_mean_mvn_samples = pivoted_cholesky = _needs_symmetry


class _General(_Unsymmetric):
    """What ``linear_operator`` makes of an operator that need not be symmetric."""

    def __init__(self, base: LinearOperator) -> None:
        super().__init__(base)
        self.base = base

    def __repr__(self) -> str:
        return f"{type(self.base).__name__} {list(self.shape)}"

    def _size(self) -> Size:
        return self.base.shape

    def _matmul(self, rhs: Tensor) -> Tensor:
        product: Tensor = self.base._matmul(rhs)
        return product

    def _t_matmul(self, rhs: Tensor) -> Tensor:
        product: Tensor = self.base._t_matmul(rhs)
        return product

    def _transpose_nonbatch(self) -> LinearOperator:
        return _General(self.base._transpose_nonbatch())

    def _expand_batch(self, batch_shape: Sequence[int]) -> LinearOperator:
        return _General(self.base._expand_batch(batch_shape))

    def _mul_constant(self, other: float | Tensor) -> LinearOperator:
        return _General(self.base._mul_constant(other))

    def _diagonal(self) -> Tensor:
        diagonal: Tensor = self.base._diagonal()
        return diagonal

    def _get_indices(self, row_index: Any, col_index: Any, *batch_indices: Any) -> Tensor:
        entries: Tensor = self.base._get_indices(row_index, col_index, *batch_indices)
        return entries

    def to_dense(self) -> Tensor:
        dense: Tensor = self.base.to_dense()
        return dense

    def _direct_solve(self, X: Tensor) -> Tensor:
        return solve_dense(self.to_dense(), X)

    def logdet(self) -> Tensor:
        return torch.linalg.slogdet(self.to_dense()).logabsdet


class MemberOperator(_Unsymmetric):
    """A member: its tensors are the representation, ``like`` tells how to put them together."""

    def __init__(self, *tensors: Tensor, like: StructuredMatrix | Kronecker) -> None:
        super().__init__(*tensors, like=like)
        self.member = like.with_tensors(tensors)

    def __repr__(self) -> str:
        return repr(self.member)

    @classmethod
    def of(cls, A: StructuredMatrix | Kronecker) -> Self:
        """``A`` on its own tensors."""
        if isinstance(A, Kronecker):  # batches are expanded tensor by tensor
            A = A.expand(*A.batch_shape)
        return cls(*A.tensors(), like=A.detach())

    def add_diagonal(self, diag: Tensor) -> LinearOperator:
        constant = diag.ndim == 0 or (diag.shape[-1] == 1 and diag.ndim == 1)
        if isinstance(self.member, StructuredMatrix) and constant:
            return MemberOperator.of(self.member.add_scaled_identity(diag.squeeze()))
        return super().add_diagonal(diag)

    def _size(self) -> Size:
        return self.member.shape

    def _matmul(self, rhs: Tensor) -> Tensor:
        product: Tensor = self.member @ rhs
        return product

    def _t_matmul(self, rhs: Tensor) -> Tensor:
        if rhs.ndim == 1:
            return self.member.apply_transpose(rhs[:, None])[..., 0]
        return self.member.apply_transpose(rhs)

    def _transpose_nonbatch(self) -> LinearOperator:
        return MemberOperator.of(self.member.mT)

    def _expand_batch(self, batch_shape: Sequence[int]) -> LinearOperator:
        dropped = len(self.batch_shape)
        return MemberOperator(
            *[t.expand(*batch_shape, *t.shape[dropped:]) for t in self._args], **self._kwargs
        )

    def _mul_constant(self, other: float | Tensor) -> LinearOperator:
        if isinstance(other, Tensor):
            other = other.expand(self.batch_shape)
        return MemberOperator.of(other * self.member)

    def _diagonal(self) -> Tensor:
        return self.to_dense().diagonal(dim1=-2, dim2=-1)

    def to_dense(self) -> Tensor:
        return self.member.to_dense()

    def _direct_solve(self, X: Tensor) -> Tensor:
        return self.member.solve(X)

    def logdet(self) -> Tensor:
        return self.member.logdet()

    def _svd(self) -> tuple[LinearOperator, Tensor, LinearOperator]:
        U, S, Vh = torch.linalg.svd(self.to_dense())
        return DenseLinearOperator(U), S, DenseLinearOperator(Vh.mT)


class RootOperator(Direct, RootLinearOperator):
    """``K K^T`` with a :class:`MemberOperator` for its root."""

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> LinearOperator:
        everything = slice(None, None, None)
        if row_index == everything and col_index == everything:
            return RootOperator(self.root._getitem(everything, everything, *batch_indices))
        return RootLinearOperator(self.root)._getitem(row_index, col_index, *batch_indices)

    def _diagonal(self) -> Tensor:
        return self.root.to_dense().square().sum(-1)

    def _direct_solve(self, X: Tensor) -> Tensor:
        K = self.root.member
        solution: Tensor = K.mT.solve(K.solve(X))
        return solution

    def logdet(self) -> Tensor:
        twice: Tensor = 2 * self.root.logdet()
        return twice

    def diagonalization(self, method: str | None = None) -> tuple[Tensor, LinearOperator]:
        # Lanczos misses repeated eigenvalues, which circulant and tied structures always have.
        pair: tuple[Tensor, LinearOperator] = super().diagonalization(method or "symeig")
        return pair

    def root_inv_decomposition(
        self, initial_vectors: Any = None, test_vectors: Any = None, method: str | None = None
    ) -> LinearOperator:
        eye = torch.eye(self.size(-1), dtype=self.dtype, device=self.device)
        return RootLinearOperator(self.root._direct_solve(eye).mT)
