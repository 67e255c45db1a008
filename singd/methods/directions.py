"""Products of gradients with factors, one after the other or by the products of factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from structured import Dense, Diagonal, Kronecker, Operator, Outer, StructuredMatrix


def apply_outer(K: StructuredMatrix, KK: Any, X: Tensor) -> Tensor:
    """``K K^T X`` in the data type of X, by the product if there is one."""
    if KK is not None:
        return KK.to(X.dtype).apply(X)
    K = K.to(X.dtype)
    return K.apply(K.apply_transpose(X))


def product_of(K: StructuredMatrix) -> Operator | None:
    """``K K^T`` as an operator that costs less than K and its transpose one after the other."""
    product = K.outer()
    return None if isinstance(product, Outer) else product


def precondition_by_products(KK: Operator, CC: Operator, G: Tensor) -> Tensor:
    """``C C^T G K K^T`` from the symmetric products."""
    if isinstance(KK, Diagonal) and isinstance(CC, Diagonal):  # as few passes as there can be
        return (G * KK.d[..., None, :]).mul_(CC.d[..., None])
    if isinstance(KK, Dense):  # K K^T is symmetric; of few rows of G its product is slow
        return CC.apply_overwriting(G @ KK.M)
    return Kronecker(CC, KK).apply_matrix(G)


def takes_apart(KK: Operator | None, CC: Operator | None) -> bool:
    """Whether :func:`precondition_apart` costs less than a copy of the columns side by side.

    Not on a GPU, where it launches more kernels, nor in low precision, where a sum of two products
    is rounded twice, nor for a dense product.
    """
    if KK is None or CC is None or isinstance(KK, Dense) or KK.device.type != "cpu":
        return False
    return KK.rows_apart and {KK.dtype, CC.dtype} <= {torch.float32, torch.float64}


def precondition_apart(KK: Operator, CC: Operator, G: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """``C C^T [G g] K K^T`` for columns in two parts, the result in the same two."""
    Y, y = KK.apply_rows(G.to(KK.dtype).mT, g.to(KK.dtype).mT)
    return CC.apply_overwriting(Y.mT).to(G.dtype), CC.apply_overwriting(y.mT).to(g.dtype)
