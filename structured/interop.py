"""The neighbours: members and Kronecker products as operators of ``linear_operator`` and of SciPy.

``linear_operator`` takes operators for symmetric positive definite unless told otherwise: its
default ``solve`` runs conjugate gradients or Cholesky, its ``svd`` an ``eigh``, and both return
numbers for a matrix that is neither. The operators here answer from the structure, and refuse what
has no meaning. Sums, slices and products that ``linear_operator`` builds out of a member are its
own: their products with tensors are right, their solves again presume symmetry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeAlias

import numpy as np
import scipy.sparse.linalg
import torch
from linear_operator.operators import DenseLinearOperator, LinearOperator, RootLinearOperator
from torch import Size, Tensor

from structured._core.composite import Composite
from structured._core.matrix import StructuredMatrix, at_least_float32
from structured.kronecker import Kronecker

AnyMember: TypeAlias = StructuredMatrix | Kronecker
AnyOperator: TypeAlias = StructuredMatrix | Composite

__all__ = ["to_linear_operator", "to_root_linear_operator", "to_scipy"]


def to_linear_operator(A: AnyMember) -> LinearOperator:
    """``A`` as a ``linear_operator.LinearOperator [..., n, n]``, gradients included.

    ``matmul``, ``solve``, ``logdet``, ``inv_quad``, ``diagonal``, ``svd`` and the transpose are
    those of ``A``, symmetric or not.

    Raises:
        NotImplementedError: From methods of the result that need a symmetric matrix, such as
            ``cholesky``; ``to_root_linear_operator`` has them.
    """
    if isinstance(A, Kronecker):  # batches are expanded tensor by tensor
        A = A.expand(*A.batch_shape)
    return _Member(*A.tensors(), like=A.detach())


def to_root_linear_operator(K: AnyMember) -> LinearOperator:
    """``K K^T`` as a positive definite ``linear_operator.LinearOperator [..., n, n]``.

    Everything follows from the root: ``solve`` is two solves with ``K``, ``logdet`` twice that of
    ``K``, samples are ``K z``. Needs an invertible ``K`` for the solves.
    """
    return _Root(to_linear_operator(K))


def to_scipy(A: AnyOperator) -> scipy.sparse.linalg.LinearOperator:
    """``A [n, n]`` as a ``scipy.sparse.linalg.LinearOperator``, with its adjoint.

    Products run in the dtype of ``A``, bfloat16 and float16 raised to float32, on its device.

    Raises:
        ValueError: If ``A`` has batch dimensions.
    """
    if A.batch_shape:
        raise ValueError(f"to_scipy: expected no batch dimensions, got {list(A.batch_shape)}")
    wide = A.detach().to(at_least_float32(A.dtype))

    def product(apply: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
        def multiply(X: np.ndarray) -> np.ndarray:
            if np.iscomplexobj(X):
                return multiply(X.real) + 1j * multiply(X.imag)
            columns = torch.from_numpy(np.array(X)).to(wide.device, wide.dtype)
            result: np.ndarray = apply(columns.reshape(A.n, -1)).reshape(X.shape).cpu().numpy()
            return result

        return multiply

    times, adjoint = product(wide.apply), product(wide.apply_transpose)
    return scipy.sparse.linalg.LinearOperator(
        (A.n, A.n),
        matvec=times,
        rmatvec=adjoint,
        matmat=times,
        rmatmat=adjoint,
        dtype=np.dtype(str(wide.dtype).removeprefix("torch.")),
    )


class _Direct(LinearOperator):
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
        nothing = torch.zeros((), dtype=self.dtype, device=self.device)
        quad = nothing
        if inv_quad_rhs is not None:
            quad = self.inv_quad(inv_quad_rhs, bool(reduce_inv_quad))
        return quad, self.logdet() if logdet else nothing


class _Member(_Direct):
    """A member: its tensors are the representation, ``like`` tells how to put them together."""

    def __init__(self, *tensors: Tensor, like: AnyMember) -> None:
        super().__init__(*tensors, like=like)
        self.member = like.with_tensors(tensors)

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
        return to_linear_operator(self.member.mT)

    def _expand_batch(self, batch_shape: Sequence[int]) -> LinearOperator:
        dropped = len(self.batch_shape)
        return _Member(
            *[t.expand(*batch_shape, *t.shape[dropped:]) for t in self._args], **self._kwargs
        )

    def _mul_constant(self, other: float | Tensor) -> LinearOperator:
        if isinstance(other, Tensor):
            other = other.expand(self.batch_shape)
        return to_linear_operator(other * self.member)

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

    def _needs_symmetry(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"{self.member!r} is not known to be symmetric; "
            "to_root_linear_operator(K) is the positive definite K K^T"
        )

    _cholesky = _symeig = _needs_symmetry
    diagonalization = root_decomposition = root_inv_decomposition = _needs_symmetry
    sqrt_inv_matmul = zero_mean_mvn_samples = pivoted_cholesky = _needs_symmetry


class _Root(_Direct, RootLinearOperator):
    """``K K^T`` with a :class:`_Member` for its root."""

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> LinearOperator:
        everything = slice(None, None, None)
        if row_index == everything and col_index == everything:
            return _Root(self.root._getitem(everything, everything, *batch_indices))
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
