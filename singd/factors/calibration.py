"""What trained factors are of the curvature: their scale, the damping in them, and what is left."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from singd.factors.curvature import Forward, average, first_of
from singd.factors.records import Calibration, KroneckerFactors
from singd.methods.options import in_range, integer
from structured import Structure, StructuredMatrix, inverse_root

TRUSTED = 0.3
"""Residual from which factors are said to be far from the curvature."""


def calibrate(
    factors: KroneckerFactors,
    model: nn.Module,
    loader: Iterable[Any],
    *,
    likelihood: str = "classification",
    refit: float | None = None,
    forward: Forward = first_of,
    columns: int | None = None,
    generator: torch.Generator | None = None,
) -> KroneckerFactors:
    """Give factors the scale of the curvature of ``model``, by one pass over data.

    >>> factors = calibrate(singd.export(optimizer), model, loader)

    Training leaves ``K K^T`` proportional to the inverse of ``S_K + d I`` with an unknown damping
    (INGD fixes the product of both sides alone, and adds the damping to it), of the empirical
    Fisher information of its last steps. Here ``S_K`` and ``S_C`` are averaged over the data at the
    present weights, and the numbers ``a`` and ``d >= 0`` found that minimise the *residual*

        ||a H + d Q - I||_F / sqrt(n),     H = Pi(K^T S_K K), Q = Pi(K^T K),

    for each factor. ``sqrt(a) K`` is the new factor: ``K K^T ~ (S_K + d I)^-1`` in the structure,
    as well as the residual says, and of use where ``d`` is far below ``tr(S_K) / n``. The Fisher
    information of one sample is then ``S_C (x) S_K``.

    The pass costs a backward pass for each output (or for each of ``columns``), and resets
    gradients; before training goes on, call ``optimizer.zero_grad()``.

    Args:
        factors: What :func:`singd.export` returned.
        model: Model with the trained weights.
        loader: Batches of the training data: inputs, or tuples whose first item they are.
        likelihood: ``"classification"``, for outputs that are logits, or ``"regression"``, for
            those that are means of Gaussians with variance one.
        refit: If given, factors are replaced by the best ones of their structures for this
            curvature, with a damping of ``refit`` times the mean eigenvalue of ``S``.
        forward: Function of model and batch that returns the outputs, ``[N, ..., k]``.
        columns: Number of random columns in place of the exact Hessian, for many outputs: labels
            drawn from the model, or normal ones.
        generator: Random numbers of the columns.

    Raises:
        ValueError: If the factors are not those of the model, there is no data, or the curvature
            of a weight is zero on it.
        FloatingPointError: If gradients on a batch are not finite.
    """
    if refit is not None:
        in_range("refit", refit, 0.0, float("inf"))
    if columns is not None:
        integer("columns", columns, 1)
    averages, samples = average(
        factors,
        model,
        loader,
        likelihood=likelihood,
        forward=forward,
        columns=columns,
        whole=refit is not None,
        generator=generator,
    )
    found = {}
    for name, one in factors.items():
        S = averages[name]
        sides = []
        pairs = ((one.K, S.S_K), (one.C, S.S_C))
        for side, (K, moment), structure in zip("KC", pairs, one.structures, strict=True):
            if not bool((moment.trace() > 0).all()):
                raise ValueError(f"{name}: expected curvature on the side of {side}, got zero")
            fit = _scaled(K, moment) if refit is None else _best(structure, moment, refit)
            sides.append(fit)
        (K, *of_K), (C, *of_C) = sides
        calibration = Calibration(*zip(of_K, of_C, strict=True))
        wide = torch.promote_types(one.K.dtype, torch.float32)
        found[name] = replace(one, K=K.to(wide), C=C.to(wide), calibration=calibration)
    return KroneckerFactors(found, samples)


def require_calibrated(factors: KroneckerFactors, purpose: str) -> None:
    """Raise unless factors were calibrated; warn if one is far from the curvature.

    Args:
        factors: Factors of any kind.
        purpose: What they are wanted for.
    """
    if not factors.is_calibrated:
        raise ValueError(
            f"{purpose}: expected factors with the scale of the curvature, got those that training "
            "left: call calibrate(factors, model, loader) first"
        )
    far = []
    for name, one in factors.items():
        if one.calibration is not None:
            residual, damping = one.calibration.worst_residual, one.calibration.relative_damping
            if not max(residual) <= TRUSTED or not max(damping) <= 1:
                far.append(f"{name} ({max(residual):.2f} and {max(damping):.2g})")
    if far:
        warnings.warn(
            f"{purpose}: expected factors with a residual of at most {TRUSTED} and a damping below "
            f"the mean curvature, got {', '.join(far)}: calibrate(..., refit=1e-2) finds the best "
            "ones of their structures",
            stacklevel=3,
        )


Fit = tuple[StructuredMatrix, Tensor, Tensor, Tensor, Tensor]
"""A factor with what its :class:`Calibration` says of it."""


def _scaled(K: StructuredMatrix, S: StructuredMatrix) -> Fit:
    """The multiple of ``K`` with ``K K^T`` closest to a damped inverse of ``S``."""
    K, S = K.double(), S.double()
    H, Q = curvature(K, S), K.gram()
    hh, qq, hq = _dot(H, H), _dot(Q, Q), _dot(H, Q)
    h, q = H.trace(), Q.trace()
    det = hh * qq - hq.square()
    is_singular = det <= 1e-10 * hh * qq  # K^T S K and K^T K are alike: no damping is seen
    d = torch.where(is_singular, 0.0, (q * hh - h * hq) / det.clamp(min=1e-300))
    a = (h * qq - q * hq) / det.clamp(min=1e-300)
    is_inner = ~is_singular & (d >= 0) & (a > 0)
    d, a = torch.where(is_inner, d, 0.0), torch.where(is_inner, a, h / hh)
    rest = (a * H + d * Q).add_scaled_identity(-1.0).frobenius_norm() / max(K.n, 1) ** 0.5
    return a.sqrt() * K, a, S.trace() / max(S.n, 1), d / a, rest


def _best(structure: Structure, S: StructuredMatrix, refit: float) -> Fit:
    """The best root that the structure has, and what its structure leaves."""
    S = S.double()
    mean = S.trace() / max(S.n, 1)
    d = refit * mean
    K = inverse_root(structure, S, d)
    rest = (curvature(K, S) + d * K.gram()).add_scaled_identity(-1.0).frobenius_norm()
    return K, torch.ones_like(d), mean, d, rest / max(K.n, 1) ** 0.5


def curvature(K: StructuredMatrix, S: StructuredMatrix) -> StructuredMatrix:
    """``Pi(K^T S K)``, of ``S`` or of its projection onto the structure of K."""
    if S.layout == K.layout:
        return K.congruence(S)
    return K.project(K.apply_transpose(K.apply_transpose(S.to_dense()).mT))


def _dot(A: StructuredMatrix, B: StructuredMatrix) -> Tensor:
    """``<A, B>_F [...]`` of members of one structure."""
    return ((A + B).frobenius_norm().square() - (A - B).frobenius_norm().square()) / 4
