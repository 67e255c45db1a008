"""Roots within a structure closed under transposition, part by part or in the Fourier basis.

Such a structure is closed under functions of symmetric members, and ``Pi(K^T S K) = K^T Pi(S) K``:
what counts of ``S`` is ``U = Pi(S)``, and the best root is a root of a power of ``U``.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from structured._core.matrix import StructuredMatrix
from structured._roots.power import inverse_power
from structured._transforms.fft import irfft, rfft
from structured.block_circulant import BlockCirculant
from structured.block_diagonal import BlockDiagonal
from structured.circulant import Circulant
from structured.dense import Dense
from structured.diagonal import Diagonal
from structured.direct_sum import DirectSum
from structured.rotated import Rotated
from structured.scaled_identity import ScaledIdentity
from structured.strided import Strided
from structured.tied import Tied


@functools.singledispatch
def root(U: StructuredMatrix, p: float) -> StructuredMatrix:
    """The member ``K`` with ``K K^T = U^{-2p}``: here ``U^{-p}`` for any closed structure.

    Args:
        U: A symmetric positive definite member.
        p: 1/2 or 1/4.
    """
    return U.orthogonal_project(inverse_power(U.to_dense(), p))


@root.register
def _(U: Dense, p: float) -> StructuredMatrix:
    return Dense(dense_root(U.M, p))


@root.register
def _(U: Diagonal, p: float) -> StructuredMatrix:
    return Diagonal(U.d.pow(-p))


@root.register
def _(U: ScaledIdentity, p: float) -> StructuredMatrix:
    return ScaledIdentity(U.c.pow(-p), U.size)


@root.register
def _(U: BlockDiagonal, p: float) -> StructuredMatrix:
    return BlockDiagonal(dense_root(U.blocks, p), dense_root(U.last, p))


@root.register
def _(U: Circulant, p: float) -> StructuredMatrix:
    values = rfft(U.c, U.n).real.pow(-p)
    return Circulant(irfft(torch.complex(values, torch.zeros_like(values)), U.n))


@root.register
def _(U: BlockCirculant, p: float) -> StructuredMatrix:
    count = U.blocks.shape[-3]
    blocks = inverse_power(rfft(U.blocks.movedim(-3, -1), count).movedim(-1, -3), p)
    return BlockCirculant(irfft(blocks.movedim(-3, -1), count).movedim(-1, -3))


@root.register
def _(U: DirectSum, p: float) -> StructuredMatrix:
    return DirectSum(root(U.A, p), root(U.C, p))


@root.register
def _(U: Tied, p: float) -> StructuredMatrix:
    return Tied(root(U.A, p), U.k)


@root.register
def _(U: Strided, p: float) -> StructuredMatrix:
    return Strided(root(U.A, p))


@root.register
def _(U: Rotated, p: float) -> StructuredMatrix:
    return Rotated(root(U.A, p), U.Q)


def dense_root(S: Tensor, p: float) -> Tensor:
    """``K`` with ``K K^T = S^{-2p}``, upper triangular for p = 1/2, symmetric for p = 1/4."""
    return upper_root(S) if p == 0.5 else inverse_power(S, p)


def upper_root(S: Tensor) -> Tensor:
    """The upper triangular ``K`` with ``K K^T = S^{-1}``: ``L^{-T}`` for ``S = L L^T``."""
    L = torch.linalg.cholesky(S)
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    return torch.linalg.solve_triangular(L, eye, upper=False).mT
