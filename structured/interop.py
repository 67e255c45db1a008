"""The neighbours: members and Kronecker products as operators of ``linear_operator`` and of SciPy.

``linear_operator`` takes operators for symmetric positive definite unless told otherwise: its
default ``solve`` runs conjugate gradients or Cholesky, its ``svd`` an ``eigh``, and both return
numbers for a matrix that is neither. The operators here answer from the structure, and refuse what
has no meaning. So do their sums, products and slices, with the member first (``A + B``, ``A @ B``,
``A.add_jitter()``, ``A[..., :k, :k]``): these are solved as dense matrices. What
``linear_operator`` itself builds around a member, such as ``B + A`` for an operator ``B`` of its
own, presumes symmetry again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import scipy.sparse.linalg
import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from structured._core.composite import Composite
from structured._core.conversions import Convertible
from structured._core.matrix import Operator, StructuredMatrix, at_least_float32
from structured._interop import MemberOperator, RootOperator
from structured.kronecker import Kronecker

AnyMember: TypeAlias = StructuredMatrix | Kronecker
AnyOperator: TypeAlias = StructuredMatrix | Composite

__all__ = ["to_linear_operator", "to_root_linear_operator", "to_scipy"]


def to_linear_operator(A: AnyMember) -> LinearOperator:
    """``A`` as a ``linear_operator.LinearOperator [..., n, n]``, gradients included.

    ``matmul``, ``solve``, ``logdet``, ``inv_quad``, ``diagonal``, ``svd`` and the transpose are
    those of ``A``, symmetric or not.

    Raises:
        TypeError: If ``A`` is neither a member nor a Kronecker product.
        NotImplementedError: From methods of the result that need a symmetric matrix, such as
            ``cholesky``; ``to_root_linear_operator`` has them.
    """
    if not isinstance(A, AnyMember):
        raise TypeError(
            f"to_linear_operator: expected a structured matrix or a Kronecker product, "
            f"got {type(A).__name__}"
        )
    return MemberOperator.of(A)


def to_root_linear_operator(K: AnyMember) -> LinearOperator:
    """``K K^T`` as a positive definite ``linear_operator.LinearOperator [..., n, n]``.

    Everything follows from the root: ``solve`` is two solves with ``K``, ``logdet`` twice that of
    ``K``, samples are ``K z``. Needs an invertible ``K`` for the solves.

    Raises:
        TypeError: If ``K`` is neither a member nor a Kronecker product.
    """
    return RootOperator(to_linear_operator(K))


def to_scipy(A: AnyOperator) -> scipy.sparse.linalg.LinearOperator:
    """``A [n, n]`` as a ``scipy.sparse.linalg.LinearOperator``, with its adjoint.

    Products run in the dtype of ``A``, bfloat16 and float16 raised to float32, on its device.

    Raises:
        TypeError: If ``A`` is no operator of numbers that can be converted.
        ValueError: If ``A`` has batch dimensions.
    """
    if not isinstance(A, Operator) or not isinstance(A, Convertible):
        raise TypeError(f"to_scipy: expected an operator, got {type(A).__name__}")
    if A.batch_shape:
        raise ValueError(f"to_scipy: expected no batch dimensions, got {list(A.batch_shape)}")
    wide = A.detach().to(at_least_float32(A.dtype))

    def product(apply: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
        def multiply(X: np.ndarray) -> np.ndarray:
            if np.iscomplexobj(X):
                return multiply(X.real) + 1j * multiply(X.imag)
            numbers = torch.from_numpy(np.array(X)).to(wide.device, wide.dtype)
            columns = numbers[:, None] if X.ndim == 1 else numbers
            result: np.ndarray = apply(columns).reshape(X.shape).cpu().numpy()
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
