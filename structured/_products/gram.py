"""Gram matrices ``X X^T``, their diagonals and their sums, in plain PyTorch.

:mod:`structured._core.dispatch` chooses between these and the kernels of ``structured/kernels``, of
which they are the definition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structured._products.in_place import accumulate_

_RUN = 1024  # numbers; a norm adds them up one after the other, which in the end loses digits


def sums_of_squares(X: Tensor) -> Tensor:
    """``diag(X X^T)``, ``[..., n]``, for ``X [..., n, m]``."""
    if _norms_pay(X):
        whole = X.shape[-1] // _RUN * _RUN
        runs, rest = X[..., :whole].unflatten(-1, (-1, _RUN)), X[..., whole:]
        return (_norm(runs).square().sum(-1) + _norm(rest).square()).to(X.dtype)
    return torch.linalg.vecdot(X, X)


def _norms_pay(X: Tensor) -> bool:
    """Whether norms of contiguous rows are faster: one pass; vecdot writes the squares out."""
    if X.numel() < 1 << 18 or X.stride(-1) != 1 or X.requires_grad:
        return False
    return X.is_cpu and X.dtype in (torch.float32, torch.float64)


def _norm(X: Tensor) -> Tensor:
    """Along the last dimension, in float32 at least."""
    return torch.linalg.vector_norm(X, dim=-1, dtype=torch.promote_types(X.dtype, torch.float32))


def symmetric_product(X: Tensor) -> Tensor:
    """``X X^T``, ``[..., n, n]``, for ``X [..., n, m]``."""
    if _panels_pay(X):
        return _by_panels(X)
    return X @ X.mT


def add_symmetric_product_(out: Tensor, X: Tensor, beta: float = 1.0, alpha: float = 1.0) -> None:
    """``out <- beta out + alpha X X^T``, multiplied and summed in the precision of ``out``.

    Args:
        out: ``[..., n, n]``, in float32 as a rule, also where ``X`` is in bfloat16.
        X: ``[..., n, m]``.
        beta: Factor of what ``out`` holds, which does not matter if it is 0.
        alpha: Factor of the product.
    """
    accumulate_(out, symmetric_product(X.to(out.dtype)), beta=beta, alpha=alpha)


def _panels_pay(X: Tensor) -> bool:
    """Whether :func:`_by_panels` is faster than a whole product.

    Measured in float32 on two cores: 0.68 to 0.82 of the time within these bounds. Products in
    bfloat16 gain nothing, and a GPU has a kernel.
    """
    n, m = X.shape[-2:]
    if n < 384 or m < n or X.numel() < 512 * 1024:
        return False
    return X.is_cpu and X.dtype in (torch.float32, torch.float64)


def _by_panels(X: Tensor, panels: int = 4) -> Tensor:
    """On and below the diagonal, by panels of columns, and mirrored: 5/8 of the work with four."""
    n = X.shape[-2]
    out = X.new_empty(*X.shape[:-2], n, n)
    width = (-(-n // panels) + 15) // 16 * 16  # panels that begin at a cache line
    for first in range(0, n, width):
        last = min(first + width, n)
        panel = X[..., first:, :] @ X[..., first:last, :].mT
        out[..., first:, first:last] = panel
        out[..., first:last, last:] = panel[..., last - first :, :].mT
    return out
