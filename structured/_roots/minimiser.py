"""The best root of any structure for a dense matrix: block by block, or by iteration."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from structured._core.matrix import StructuredMatrix, Transposed, trailing
from structured._core.spec import parse
from structured._roots.closed import dense_root, root
from structured._roots.iteration import iterate
from structured.block_triangular import BlockLower, BlockUpper
from structured.direct_sum import DirectSum
from structured.hierarchical import Hierarchical
from structured.rotated import Rotated
from structured.strided import Strided
from structured.tied import Tied
from structured.toeplitz import LowerToeplitz, UpperToeplitz
from structured.triangular import LowerTriangular, UpperTriangular


@functools.singledispatch
def minimiser(zero: StructuredMatrix, S: Tensor, p: float) -> StructuredMatrix:
    """The minimiser for ``S``, a member like ``zero``: here for any structure.

    Args:
        zero: Any member, without batch dimensions.
        S: ``[..., n, n]``, symmetric positive definite.
        p: 1/2 for the inverse, 1/4 for whitening.
    """
    return root(zero.project(S), p) if zero.closed_under_transpose else iterate(zero, S, p)


@minimiser.register
def _(zero: Transposed, S: Tensor, p: float) -> StructuredMatrix:
    named = zero.A.mT
    if isinstance(named, Transposed):
        return minimiser.dispatch(StructuredMatrix)(zero, S, p)
    K = minimiser(named, S, p)
    same = named.mT.layout == zero.A.layout  # not where a part of A is itself a transpose
    return Transposed(K.mT) if same else zero.orthogonal_project(K.to_dense())


@minimiser.register
def _(zero: UpperTriangular, S: Tensor, p: float) -> StructuredMatrix:
    return zero.orthogonal_project(_upper(S, p))


@minimiser.register
def _(zero: LowerTriangular, S: Tensor, p: float) -> StructuredMatrix:
    return zero.orthogonal_project(_upper(S.flip(-2, -1), p).flip(-2, -1))


@minimiser.register
def _(zero: LowerToeplitz, S: Tensor, p: float) -> StructuredMatrix:
    return LowerToeplitz(_toeplitz(S)) if p == 0.5 else iterate(zero, S, p)


@minimiser.register
def _(zero: UpperToeplitz, S: Tensor, p: float) -> StructuredMatrix:
    return UpperToeplitz(_toeplitz(S.flip(-2, -1))) if p == 0.5 else iterate(zero, S, p)


@minimiser.register
def _(zero: BlockUpper, S: Tensor, p: float) -> StructuredMatrix:
    if p != 0.5:
        return iterate(zero, S, p)
    k = zero.A.n
    S11, S12, S22 = S[..., :k, :k], S[..., :k, k:], S[..., k:, k:]
    G = torch.cholesky_solve(S12, torch.linalg.cholesky(S11))
    C = minimiser(zero.C, S22 - S12.mT @ G, p)
    return BlockUpper(minimiser(zero.A, S11, p), -(G @ C), C)


@minimiser.register
def _(zero: BlockLower, S: Tensor, p: float) -> StructuredMatrix:
    if p != 0.5:
        return iterate(zero, S, p)
    k = zero.A.n
    S11, S21, S22 = S[..., :k, :k], S[..., k:, :k], S[..., k:, k:]
    G = torch.cholesky_solve(S21, torch.linalg.cholesky(S22))
    A = minimiser(zero.A, S11 - S21.mT @ G, p)
    return BlockLower(A, -(G @ A), minimiser(zero.C, S22, p))


@minimiser.register
def _(zero: Hierarchical, S: Tensor, p: float) -> StructuredMatrix:
    k1, k2 = zero.top.shape[-2], zero.bottom.shape[-2]
    rest = f"block_lower(diagonal, dense, -{k2})" if k2 else "diagonal"
    same = parse(f"block_upper(dense, {rest}, {k1})")(zero.n, dtype=S.dtype, device=S.device)
    return zero.orthogonal_project(minimiser(same, S, p).to_dense())


@minimiser.register
def _(zero: DirectSum, S: Tensor, p: float) -> StructuredMatrix:
    k = zero.A.n
    first, last = S[..., :k, :k], S[..., k:, k:]
    return DirectSum(minimiser(zero.A, first, p), minimiser(zero.C, last, p))


@minimiser.register
def _(zero: Tied, S: Tensor, p: float) -> StructuredMatrix:
    return Tied(minimiser(zero.A, zero.mean_block(S), p), zero.k)


@minimiser.register
def _(zero: Strided, S: Tensor, p: float) -> StructuredMatrix:
    return Strided(minimiser(zero.A, zero.blocks(S), p))


@minimiser.register
def _(zero: Rotated, S: Tensor, p: float) -> StructuredMatrix:
    return Rotated(minimiser(zero.A, zero.unrotate(zero.unrotate(S).mT), p), zero.Q)


def _upper(S: Tensor, p: float) -> Tensor:
    """The upper triangular ``K`` with ``K K^T = S^{-2p}``."""
    K = dense_root(S, p)
    if p == 0.5:
        return K
    return torch.linalg.cholesky((K @ K).flip(-2, -1)).flip(-2, -1)


def _toeplitz(S: Tensor) -> Tensor:
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
