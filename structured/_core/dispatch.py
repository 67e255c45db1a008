"""Gram matrices: by kernels on a GPU, by :mod:`structured._products.gram` anywhere else.

On the CPU that costs one attribute; a call of a custom operator costs 5 to 15 us, as much as small
products themselves. On CUDA PyTorch's dispatcher chooses further. Without ``structured/kernels``
plain PyTorch serves every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structured._products import gram

try:
    from structured import kernels  # registers the operators; Triton is imported on first use
except ImportError:  # the folder is not there
    kernels = None  # type: ignore[assignment]  # in the place of a module


def sums_of_squares(X: Tensor) -> Tensor:
    """``diag(X X^T)``, ``[..., n]``, for ``X [..., n, m]``."""
    if X.is_cuda and kernels is not None:
        squares: Tensor = torch.ops.structured.sums_of_squares(X)
        return squares
    return gram.sums_of_squares(X)


def symmetric_product(X: Tensor) -> Tensor:
    """``X X^T``, ``[..., n, n]``, for ``X [..., n, m]``."""
    if X.is_cuda and kernels is not None:
        product: Tensor = torch.ops.structured.symmetric_product(X)
        return product
    return gram.symmetric_product(X)


def add_symmetric_product_(out: Tensor, X: Tensor, beta: float = 1.0, alpha: float = 1.0) -> None:
    """``out <- beta out + alpha X X^T``, summed in the precision of ``out``.

    Args:
        out: ``[..., n, n]``, in float32 as a rule, also where ``X`` is in bfloat16.
        X: ``[..., n, m]``.
        beta: Factor of what ``out`` holds.
        alpha: Factor of the product.
    """
    if X.is_cuda and kernels is not None:
        torch.ops.structured.add_symmetric_product_(out, X, beta, alpha)
    else:
        gram.add_symmetric_product_(out, X, beta, alpha)
