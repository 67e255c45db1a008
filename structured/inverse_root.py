"""The best root a structure can hold: ``K`` with ``K K^T`` close to ``(S + damping I)^{-1}``.

Close in the sense of the Gaussians ``N(0, K K^T)`` and ``N(0, (S + damping I)^{-1})``: among the
members of a structure, :func:`inverse_root` finds one of least :func:`divergence`. It is what the
inverse-free updates of the optimizers head for, found exactly.
"""

from __future__ import annotations

import functools
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from structured._core.checks import check_definite
from structured._core.composite import Composite
from structured._core.matrix import Operator, StructuredMatrix
from structured._core.spec import StructureLike, parse
from structured._core.stored import Stored
from structured._roots.closed import root
from structured._roots.minimiser import minimiser
from structured.dense import Dense
from structured.scaled_identity import ScaledIdentity

Kind: TypeAlias = Literal["inverse", "whitening"]

_POWERS = {"inverse": 0.5, "whitening": 0.25}


def inverse_root(
    structure: StructureLike,
    S: Tensor | Operator,
    damping: float | Tensor = 0.0,
    *,
    kind: Kind = "inverse",
) -> StructuredMatrix:
    """The member ``K`` that minimises ``trace(K^T (S + damping I) K) - 2 log|det K|``.

    Equivalently ``Pi(K^T (S + damping I) K) = I``. Dense and full-triangular structures reach
    ``K K^T = (S + damping I)^{-1}``; the others come as close as they can.

    With ``kind="whitening"`` it minimises ``trace(K^T (S + damping I) K) + trace((K K^T)^{-1})``:
    the preconditioner ``P = K K^T`` gives gradients of covariance ``S`` the covariance
    ``P S P = I`` where the structure can hold ``P = S^{-1/2}``, as that of Shampoo (Gupta et al.,
    arXiv 1802.09568) and of PSGD (Li, arXiv 1512.04202), whose criterion this is.

    Computed in float64, in closed form for all structures closed under transposition (the function
    of ``Pi(S)``: circulant ones by one FFT, block-diagonal ones block by block, any other by one
    eigendecomposition), for triangular ones (Cholesky factors of blocks), and for triangular
    Toeplitz and block-triangular ones, of the inverse. What is left iterates ``K <- K (I - b m)``,
    ``m = (Pi(K^T S K) - I) / 2``, until ``|Pi(K^T S K) - I|_F`` is below ``1e-10 sqrt(n)`` or lost
    in rounding; a step costs n^3.

    Args:
        structure: The structure of the root; whatever :func:`structured.parse` takes.
        S: Symmetric positive semi-definite, ``[..., n, n]``: a tensor or an operator. A member of
            a structure closed under transposition is not written out for its root within it.
        damping: A number or a tensor of the batch shape of ``S``.
        kind: ``"inverse"`` or ``"whitening"``.

    Returns:
        A member of ``structure`` with the batch shape, dtype and device of ``S``.

    Raises:
        ValueError: If ``S`` is not square, the structure has no member of its size, or the kind is
            unknown.
        torch.linalg.LinAlgError: If what the structure sees of ``S + damping I`` (all of it,
            blocks, means) is not positive definite.
        RuntimeError: If the iteration does not reach its tolerance in 10000 steps.
    """
    if kind not in _POWERS:
        raise ValueError(f"inverse_root: expected a kind of {list(_POWERS)}, got {kind!r}")
    if isinstance(S, Operator):
        return _finite(_of_operator(structure, S, damping, _POWERS[kind]).to(S.dtype))
    wide = _damped(S, damping)
    zero = parse(structure)(S.shape[-1], dtype=torch.float64, device=S.device)
    return _finite(minimiser(zero, wide, _POWERS[kind]).to(S.dtype))


def _finite(K: StructuredMatrix) -> StructuredMatrix:
    """``K``, or the error of a Cholesky factor: powers of eigenvalues that are not positive."""
    if not K.n:
        return K
    flat = (t.detach()[..., None].flatten(len(K.batch_shape)) for t in K.tensors())
    check_definite(functools.reduce(torch.logical_or, (~t.isfinite().all(-1) for t in flat)))
    return K


def _of_operator(
    structure: StructureLike, S: Operator, damping: float | Tensor, p: float
) -> StructuredMatrix:
    wide = S.to(torch.float64) if isinstance(S, Stored | Composite) else S
    make = functools.partial(parse(structure), S.n, dtype=torch.float64, device=S.device)
    zero = make()
    if zero.closed_under_transpose:
        U = _projected(make(batch_shape=S.batch_shape), wide)
        return root(U.add_scaled_identity(damping), p)
    return minimiser(zero, _damped(wide.to_dense(), damping), p)


def _projected(zero: StructuredMatrix, S: Operator) -> StructuredMatrix:
    """``Pi(S)``, without writing ``S`` out where its structure says enough."""
    if isinstance(S, StructuredMatrix):
        if S.layout == zero.layout:
            return S
        if isinstance(zero, ScaledIdentity):
            return ScaledIdentity(S.trace() / max(S.n, 1), S.n)
    return zero.project(S.to_dense().to(zero.dtype))


def divergence(K: StructuredMatrix, S: Tensor | Operator, damping: float | Tensor = 0.0) -> Tensor:
    """``KL(N(0, K K^T) || N(0, (S + damping I)^{-1}))`` in nats, ``[...]``.

    ``(trace(K^T (S + damping I) K) - n - log det(K^T (S + damping I) K)) / 2``: zero if and only if
    ``K K^T`` is the inverse, and the smaller the more of ``S`` the structure can hold. Computed in
    float64 at n^3 by a Cholesky factor.

    Args:
        K: An invertible member, ``[..., n, n]``.
        S: Symmetric positive semi-definite, ``[..., n, n]``: a tensor or an operator.
        damping: A number or a tensor of the batch shape of ``S``.

    Raises:
        ValueError: If the shapes do not fit.
        torch.linalg.LinAlgError: If ``S + damping I`` is not positive definite.
    """
    matrix = S.to_dense() if isinstance(S, Operator) else S
    wide, K = _damped(matrix, damping), K.to(torch.float64)
    conjugate = K.apply_transpose(K.apply_transpose(wide).mT)  # K^T S K
    trace = conjugate.diagonal(dim1=-2, dim2=-1).sum(-1)
    half_logdet = torch.linalg.cholesky(wide).diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return ((trace - K.n) / 2 - half_logdet - K.logdet()).to(S.dtype)


def _damped(S: Tensor, damping: float | Tensor) -> Tensor:
    """``S + damping I`` in float64."""
    if S.ndim < 2 or S.shape[-1] != S.shape[-2]:
        raise ValueError(f"expected S [..., n, n], got {list(S.shape)}")
    return Dense(S.to(torch.float64)).add_scaled_identity(damping).M
