"""Negative powers of symmetric positive definite matrices, differentiable everywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def inverse_power(M: Tensor, p: float) -> Tensor:
    """``M^{-p}`` for ``p`` 1/2 or 1/4 and ``M [..., n, n]``, symmetric or Hermitian.

    NaN where an eigenvalue is negative. Only the lower triangle is read. Unlike those of
    :func:`torch.linalg.eigh`, gradients need no distinct eigenvalues. There are no second ones.
    """
    power: Tensor = _for_now(_InversePower, _ForwardInversePower).apply(M, p)[0]
    return power


def _derivative(*arguments: Any) -> Tensor:
    derivative: Tensor = _for_now(_Derivative, _ForwardDerivative).apply(*arguments)
    return derivative


def _for_now(backward: Any, both: Any) -> Any:
    """The compiler takes no functions with forward derivatives."""
    return backward if torch.compiler.is_compiling() else both


class _InversePower(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(M: Tensor, p: float) -> tuple[Tensor, Tensor, Tensor]:
        values, Q = torch.linalg.eigh(M)
        return (Q * values.pow(-p).unsqueeze(-2)) @ Q.mH, values, Q

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, ...]) -> None:
        (M, ctx.p), (_, values, Q) = inputs, output
        ctx.mark_non_differentiable(values, Q)
        ctx.save_for_backward(M, values, Q)
        ctx.save_for_forward(M, values, Q)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _derivative(gradients[0], *ctx.saved_tensors, ctx.p), None


class _Derivative(torch.autograd.Function):
    """That at ``M`` along ``G``, its own adjoint; linear in ``G``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(G: Tensor, M: Tensor, values: Tensor, Q: Tensor, p: float) -> Tensor:
        """Daleckii and Krein: entrywise with ``(f(a) - f(b)) / (a - b)`` in the eigenbasis."""
        x = values.pow(p)
        x, y = x[..., :, None], x[..., None, :]
        # a - b = x^2 - y^2 or x^4 - y^4, and 1 / x - 1 / y = (y - x) / (x y)
        F = -1 / (x * y * (x + y))
        F = F if p == 0.5 else F / (x * x + y * y)
        return Q @ (F * (Q.mH @ G @ Q)) @ Q.mH

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, M, values, Q, ctx.p = inputs
        ctx.save_for_backward(M, values, Q)
        ctx.save_for_forward(M, values, Q)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.needs_input_grad[1]:
            raise NotImplementedError("inverse_root: expected first derivatives, got second ones")
        return _derivative(gradients[0], *ctx.saved_tensors, ctx.p), None, None, None, None


class _ForwardInversePower(_InversePower):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None, None]:
        return _derivative(tangents[0], *ctx.saved_tensors, ctx.p), None, None


class _ForwardDerivative(_Derivative):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        along, at, *_ = tangents
        if at is not None:
            raise NotImplementedError("inverse_root: expected first derivatives, got second ones")
        return _derivative(along, *ctx.saved_tensors, ctx.p)
