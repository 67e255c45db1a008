"""The best root by descent on the group of invertible members, where nothing else is known.

The objective is ``trace(K^T S K) - 2 log|det K|`` for the inverse, and
``trace(K^T S K) + trace((K K^T)^{-1})`` for whitening. Along ``K exp(tN)`` its slope is
``2 <M - W, N>`` with ``M = K^T S K``, and ``W = I`` or ``K^{-1} K^{-T}``: at the minimum
``Pi(M) = Pi(W)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structured._core.checks import check_definite
from structured._core.matrix import StructuredMatrix

_TOLERANCE = 1e-10
_MAX_ITERATIONS = 10_000


def iterate(zero: StructuredMatrix, S: Tensor, p: float) -> StructuredMatrix:
    """The minimiser for ``S``, a member like ``zero``.

    Args:
        zero: Any member, without batch dimensions.
        S: ``[..., n, n]``, symmetric positive definite.
        p: 1/2 for the inverse, 1/4 for whitening.

    Raises:
        torch.linalg.LinAlgError: If ``K`` grows until rounding hides all of ``W``, as it does where
            what the structure sees of ``S`` is not positive definite.
        RuntimeError: If it takes more than 10000 steps.
        NotImplementedError: Within ``vmap``.
    """
    if torch._C._functorch.is_batchedtensor(S):
        raise NotImplementedError(
            f"inverse_root: expected S with batch dimensions for {zero!r}, got vmap, which cannot "
            "tell when an iteration is done"
        )
    largest = torch.linalg.matrix_norm(S, 2) if zero.n else S.new_ones(())
    check_definite(~(largest > 0))
    K = zero.project(torch.zeros_like(S)).add_scaled_identity(largest.pow(-p))
    v, age = K.zeros_like(), torch.zeros_like(largest)
    eps = torch.finfo(S.dtype).eps
    for _ in range(_MAX_ITERATIONS):
        M = K.apply_transpose(K.apply_transpose(S).mT)
        W, curvature, floor = _other_side(K, p)
        m = (K.project(M) - W) / 2
        residual = 2 * m.frobenius_norm()
        rounding = eps * (largest * K.frobenius_norm().square() + floor)
        aim = W.frobenius_norm()
        check_definite(~(rounding <= aim))  # NaN fails as well
        if (residual <= _TOLERANCE * aim + rounding).all():
            return K
        # Nesterov's momentum, begun anew where it points uphill
        uphill = (m + v).frobenius_norm() > (m - v).frobenius_norm()
        age = torch.where(uphill, 0, age + 1)
        # The curvature along m is at most that: there is no step length to search for.
        bound = (torch.linalg.matrix_norm(M, 2) + curvature).clamp(min=1 if p == 0.5 else 0)
        v = (age / (age + 3)) * v - m / bound
        K = K @ v.add_scaled_identity(1.0)
    raise RuntimeError(
        f"inverse_root: the residual is {residual.max():.1e} after {_MAX_ITERATIONS} steps "
        f"for {zero!r}"
    )


def _other_side(K: StructuredMatrix, p: float) -> tuple[StructuredMatrix, Tensor, Tensor]:
    """``Pi(W)``, the curvature that ``W`` adds, and the magnitude that its rounding goes by."""
    if p == 0.5:
        nothing = K.trace().new_zeros(())
        return K.zeros_like().add_scaled_identity(1.0), nothing, nothing
    eye = torch.eye(K.n, dtype=K.dtype, device=K.device)
    inverse = K.solve(eye.expand(K.shape))
    squares = inverse.square().sum((-2, -1))
    largest = torch.linalg.matrix_norm(inverse, 2).square() if K.n else squares
    # errors of the solve are those of the inverse times the condition number
    return K.project_gram(inverse), 3 * largest, squares * squares.sqrt() * K.frobenius_norm()
