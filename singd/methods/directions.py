"""Products of gradients with factors, one after the other or by the products of factors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from structured import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Kronecker,
    Operator,
    Outer,
    ScaledIdentity,
    StructuredMatrix,
)


def apply_outer(K: StructuredMatrix, KK: Any, X: Tensor) -> Tensor:
    """``K K^T X`` in the data type of X, by the product if there is one."""
    if KK is not None:
        product: Tensor = KK.to(X.dtype).apply(X)
        return product
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


def mixed_rows(C: StructuredMatrix) -> int | None:
    """How many rows of X are mixed in ``C X``, block by block; ``None`` for others than blocks."""
    if isinstance(C, Diagonal | ScaledIdentity):
        return 1
    return C.blocks.shape[-1] if isinstance(C, BlockDiagonal) else None


def within(C: Any, rows: slice) -> Any:
    """The part of C that multiplies some rows of X, which are whole blocks; views.

    Args:
        C: Member of which :func:`mixed_rows` knows.
        rows: First and last of the rows.
    """
    if isinstance(C, ScaledIdentity):
        return ScaledIdentity(C.c, rows.stop - rows.start)
    if isinstance(C, Diagonal):
        return Diagonal(C.d[..., rows])
    count, k = C.blocks.shape[-3:-1]
    blocks = C.blocks[..., rows.start // k : rows.stop // k, :, :]
    has_last = rows.start <= count * k < rows.stop
    return BlockDiagonal(blocks, C.last if has_last else C.last[..., :0, :0])
