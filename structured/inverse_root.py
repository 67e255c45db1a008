"""The best root a structure can hold: ``K`` with ``K K^T`` close to ``(S + damping I)^{-1}``.

Close in the sense of the Gaussians ``N(0, K K^T)`` and ``N(0, (S + damping I)^{-1})``: among the
members of a structure, :func:`inverse_root` finds one of least :func:`divergence`. It is what the
inverse-free updates of the optimizers head for, found exactly.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from structured._core.matrix import StructuredMatrix, trailing
from structured._core.spec import StructureLike, parse
from structured.block_diagonal import BlockDiagonal
from structured.block_triangular import BlockLower, BlockUpper
from structured.dense import Dense
from structured.diagonal import Diagonal
from structured.direct_sum import DirectSum
from structured.rotated import Rotated
from structured.strided import Strided
from structured.tied import Tied
from structured.toeplitz import LowerToeplitz, UpperToeplitz
from structured.transposed import Transposed
from structured.triangular import LowerTriangular, UpperTriangular

_TOLERANCE = 1e-10
_MAX_ITERATIONS = 10_000


def inverse_root(
    structure: StructureLike, S: Tensor, damping: float | Tensor = 0.0
) -> StructuredMatrix:
    """The member ``K`` that minimises ``trace(K^T (S + damping I) K) - 2 log|det K|``.

    Equivalently ``Pi(K^T (S + damping I) K) = I``. Dense and full-triangular structures reach
    ``K K^T = (S + damping I)^{-1}``; the others come as close as they can. Computed in float64, by
    the closed form that most built-in structures have (Cholesky factors of blocks). Any other
    structure iterates ``K <- K (I - b m)``, ``m = (Pi(K^T S K) - I) / 2``, until
    ``|Pi(K^T S K) - I|_F`` is below ``1e-10 sqrt(n)`` or lost in rounding; a step costs n^3.

    Args:
        structure: As for :func:`structured.parse`.
        S: Symmetric positive semi-definite, ``[..., n, n]``.
        damping: A number or a tensor of the batch shape of ``S``.

    Returns:
        A member of ``structure`` with the batch shape, dtype and device of ``S``.

    Raises:
        ValueError: If ``S`` is not square, or the structure has no member of its size.
        torch.linalg.LinAlgError: If a Cholesky factor of ``S + damping I`` or of a block of it does
            not exist. (Where the structure looks at the diagonal alone, the result is NaN instead.)
        RuntimeError: If the iteration does not reach its tolerance in 10000 steps.
    """
    wide = _damped(S, damping)
    zero = parse(structure)(S.shape[-1], dtype=torch.float64, device=S.device)
    return _minimiser(zero, wide).to(S.dtype)


def divergence(K: StructuredMatrix, S: Tensor, damping: float | Tensor = 0.0) -> Tensor:
    """``KL(N(0, K K^T) || N(0, (S + damping I)^{-1}))`` in nats, ``[...]``.

    ``(trace(K^T (S + damping I) K) - n - log det(K^T (S + damping I) K)) / 2``: zero if and only if
    ``K K^T`` is the inverse, and the smaller the more of ``S`` the structure can hold. Computed in
    float64 at n^3 by a Cholesky factor.

    Args:
        K: An invertible member, ``[..., n, n]``.
        S: Symmetric positive semi-definite, ``[..., n, n]``.
        damping: A number or a tensor of the batch shape of ``S``.

    Raises:
        ValueError: If the shapes do not fit.
        torch.linalg.LinAlgError: If ``S + damping I`` is not positive definite.
    """
    wide, K = _damped(S, damping), K.to(torch.float64)
    trace = _conjugate(K, wide).diagonal(dim1=-2, dim2=-1).sum(-1)
    half_logdet = torch.linalg.cholesky(wide).diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return ((trace - K.n) / 2 - half_logdet - K.logdet()).to(S.dtype)


def _damped(S: Tensor, damping: float | Tensor) -> Tensor:
    """``S + damping I`` in float64."""
    if S.ndim < 2 or S.shape[-1] != S.shape[-2]:
        raise ValueError(f"expected S [..., n, n], got {list(S.shape)}")
    return Dense(S.to(torch.float64)).add_scaled_identity(damping).M


def _conjugate(K: StructuredMatrix, S: Tensor) -> Tensor:
    """``K^T S K``."""
    return K.apply_transpose(K.apply_transpose(S).mT)


@functools.singledispatch
def _minimiser(zero: StructuredMatrix, S: Tensor) -> StructuredMatrix:
    """The minimiser for ``S``, a member like ``zero``: here for any structure, by iteration."""
    closed = zero.closed_under_transpose
    if closed:
        S = zero.project(S).to_dense()  # Pi(K^T S K) = K^T Pi(S) K: the steps become Newton's
    largest = torch.linalg.matrix_norm(S, 2) if zero.n else S.new_ones(())
    K = zero.project(torch.zeros_like(S)).add_scaled_identity(largest.rsqrt())
    v, age = K.zeros_like(), torch.zeros_like(largest)
    for _ in range(_MAX_ITERATIONS):
        M = _conjugate(K, S)
        m = K.project(M).add_scaled_identity(-1.0) / 2
        residual = 2 * m.frobenius_norm()
        rounding = torch.finfo(S.dtype).eps * largest * K.frobenius_norm().square()
        if (residual <= _TOLERANCE * K.n**0.5 + rounding).all():
            return K
        if not closed:  # Nesterov's momentum, begun anew where it points uphill
            uphill = (m + v).frobenius_norm() > (m - v).frobenius_norm()
            age = torch.where(uphill, 0, age + 1)
        # The curvature along m is at most |M|_2: there is no step length to search for.
        v = (age / (age + 3)) * v - m / torch.linalg.matrix_norm(M, 2).clamp(min=1)
        K = K @ v.add_scaled_identity(1.0)
    raise RuntimeError(
        f"inverse_root: |Pi(K^T S K) - I| = {residual.max():.1e} after {_MAX_ITERATIONS} steps "
        f"for {zero!r}"
    )


@_minimiser.register
def _(zero: Transposed, S: Tensor) -> StructuredMatrix:
    named = zero.A.mT
    if isinstance(named, Transposed):
        return _minimiser.dispatch(StructuredMatrix)(zero, S)
    K = _minimiser(named, S)
    same = named.mT.layout == zero.A.layout  # not where a part of A is itself a transpose
    return Transposed(K.mT) if same else zero.orthogonal_project(K.to_dense())


@_minimiser.register
def _(zero: Diagonal, S: Tensor) -> StructuredMatrix:
    return Diagonal(S.diagonal(dim1=-2, dim2=-1).rsqrt())


@_minimiser.register(Dense)
@_minimiser.register(UpperTriangular)
def _(zero: StructuredMatrix, S: Tensor) -> StructuredMatrix:
    return zero.orthogonal_project(_upper_root(S))


@_minimiser.register
def _(zero: LowerTriangular, S: Tensor) -> StructuredMatrix:
    return zero.orthogonal_project(_upper_root(S.flip(-2, -1)).flip(-2, -1))


@_minimiser.register
def _(zero: BlockDiagonal, S: Tensor) -> StructuredMatrix:
    P = zero.project(S)
    return BlockDiagonal(_upper_root(P.blocks), _upper_root(P.last))


@_minimiser.register
def _(zero: LowerToeplitz, S: Tensor) -> StructuredMatrix:
    return LowerToeplitz(_toeplitz_root(S))


@_minimiser.register
def _(zero: UpperToeplitz, S: Tensor) -> StructuredMatrix:
    return UpperToeplitz(_toeplitz_root(S.flip(-2, -1)))


@_minimiser.register
def _(zero: BlockUpper, S: Tensor) -> StructuredMatrix:
    k = zero.A.n
    S11, S12, S22 = S[..., :k, :k], S[..., :k, k:], S[..., k:, k:]
    G = torch.cholesky_solve(S12, torch.linalg.cholesky(S11))
    C = _minimiser(zero.C, S22 - S12.mT @ G)
    return BlockUpper(_minimiser(zero.A, S11), -(G @ C), C)


@_minimiser.register
def _(zero: BlockLower, S: Tensor) -> StructuredMatrix:
    k = zero.A.n
    S11, S21, S22 = S[..., :k, :k], S[..., k:, :k], S[..., k:, k:]
    G = torch.cholesky_solve(S21, torch.linalg.cholesky(S22))
    A = _minimiser(zero.A, S11 - S21.mT @ G)
    return BlockLower(A, -(G @ A), _minimiser(zero.C, S22))


@_minimiser.register
def _(zero: DirectSum, S: Tensor) -> StructuredMatrix:
    k = zero.A.n
    return DirectSum(_minimiser(zero.A, S[..., :k, :k]), _minimiser(zero.C, S[..., k:, k:]))


@_minimiser.register
def _(zero: Tied, S: Tensor) -> StructuredMatrix:
    return Tied(_minimiser(zero.A, zero.mean_block(S)), zero.k)


@_minimiser.register
def _(zero: Strided, S: Tensor) -> StructuredMatrix:
    return Strided(_minimiser(zero.A, zero.blocks(S)))


@_minimiser.register
def _(zero: Rotated, S: Tensor) -> StructuredMatrix:
    return Rotated(_minimiser(zero.A, zero.unrotate(zero.unrotate(S).mT)), zero.Q)


def _upper_root(S: Tensor) -> Tensor:
    """The upper triangular ``K`` with ``K K^T = S^{-1}``: ``L^{-T}`` for ``S = L L^T``."""
    L = torch.linalg.cholesky(S)
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    return torch.linalg.solve_triangular(L, eye, upper=False).mT


def _toeplitz_root(S: Tensor) -> Tensor:
    """The lower Toeplitz minimiser ``t [..., n]``.

    The objective is ``t^T Q t - 2 n log t_0`` with ``Q_kl = sum_j S_{k+j, l+j}``, least where
    ``t_0 Q t = n e_0``.
    """
    n = S.shape[-1]
    if n == 0:
        return S.sum(-1)
    first = S.new_zeros(n, 1)
    first[0] = n
    t = torch.cholesky_solve(first, torch.linalg.cholesky(_tail_sums(S)))[..., 0]
    return t * trailing(t[..., 0].rsqrt(), t)


def _tail_sums(S: Tensor) -> Tensor:
    """``Q_kl = sum_j S_{k+j, l+j}``, the sums along each diagonal from here to its end."""
    Q = S.clone()
    for k in reversed(range(S.shape[-1] - 1)):
        Q[..., k, :-1] += Q[..., k + 1, 1:]
    return Q
