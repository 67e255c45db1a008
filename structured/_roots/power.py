"""Negative powers of symmetric positive definite matrices, differentiable everywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def inverse_power(M: Tensor, p: float) -> Tensor:
    """``M^{-p}`` for ``p`` 1/2 or 1/4 and ``M [..., n, n]``, symmetric or Hermitian.

    NaN where an eigenvalue is negative. Only the lower triangle is read. Unlike those of
    :func:`torch.linalg.eigh`, gradients need no distinct eigenvalues.
    """
    power: Tensor = _InversePower.apply(M, p)
    return power


class _InversePower(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, M: Tensor, p: float) -> Tensor:
        values, Q = torch.linalg.eigh(M)
        ctx.save_for_backward(values, Q)
        ctx.p = p
        return (Q * values.pow(-p).unsqueeze(-2)) @ Q.mH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Daleckii and Krein: entrywise with ``(f(a) - f(b)) / (a - b)`` in the eigenbasis."""
        values, Q = ctx.saved_tensors
        (G,) = gradients
        x = values.pow(ctx.p)
        x, y = x[..., :, None], x[..., None, :]
        # a - b = x^2 - y^2 or x^4 - y^4, and 1 / x - 1 / y = (y - x) / (x y)
        F = -1 / (x * y * (x + y))
        F = F if ctx.p == 0.5 else F / (x * x + y * y)
        return Q @ (F * (Q.mH @ G @ Q)) @ Q.mH, None
