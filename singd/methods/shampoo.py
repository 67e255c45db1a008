"""KL-Shampoo and root-free Shampoo without roots, inverses or decompositions: of gradients alone.

A gradient ``G [d_1, ..., d_k]`` of ``d`` numbers is modelled as a Gaussian whose covariance is the
Kronecker product of ``S_1, ..., S_k``. Minimising the KL divergence to it gives (Lin et al., arXiv
2509.03378, for matrices)::

    S_1 <- (1 - beta_1) S_1 + beta_1 / d_2 (G S_2^-1 G^T + lambda tr(S_2^-1) I)

and alike for every mode. Here ``S_i^-1 = K_i K_i^T`` with ``K_i`` in a structure, and of the
whitened gradient ``Y = G x_1 K_1^T ... x_k K_k^T`` with unfoldings ``Y_i`` (Lin et al., arXiv
2402.03496, Figure 3, without momentum)::

    H_i = Pi(d_i / d Y_i Y_i^T + lambda prod_{j != i} mean(K_j^T K_j) K_i^T K_i)
    K_i <- K_i (I - beta_1/2 (H_i - I))

which equals it to first order in ``beta_1``. The direction is ``G x_1 S_1^-p ... x_k S_k^-p``, with
``p = 1`` (root-free) or ``p = 1/2`` (KL-Shampoo), where ``S^(-1/2)`` is ``(K K^T)^(1/2)``, found
by products in the structure once for each update of the factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from singd.methods.base import Factors, Method, Options, Products
from singd.methods.directions import apply_outer, product_of
from singd.methods.options import choice, in_range, lr_cov, wide, within_limit
from singd.update import first_scale, is_measured
from structured import Diagonal, Structure, StructuredMatrix, parse

GROW = (3.4445, -4.7750, 2.0315)
CONVERGE = (1.5, -0.5, 0.0)
"""Coefficients of ``a X + b X X^T X + c (X X^T)^2 X``."""

LARGE = 2**40  # a size beyond every limit of a structure


@dataclass(frozen=True)
class Modes(Factors):
    """``K_i`` with ``K_i K_i^T ~ S_i^-1``, one for each mode."""

    K: tuple[StructuredMatrix, ...]


class GradientCovariance(Method):
    """KL-Shampoo (``power=0.5``) and root-free Shampoo (``power=1``)."""

    needs_activations = False
    identity = ("structures", "max_dim", "wide_structure")

    def check(self, options: Options) -> None:
        """Raise ``ValueError`` if an option is out of range."""
        if options["lr_cov"] is not None and not callable(options["lr_cov"]):
            in_range("lr_cov", options["lr_cov"], 0.0, 1.0)
        choice("power", options["power"], (0.5, 1))
        if options["max_dim"] is not None:
            in_range("max_dim", options["max_dim"], 0, float("inf"))
        specs = [*_specs(options["structures"]), options["wide_structure"] or "diagonal"]
        for structure in (parse(spec).at(n) for spec in specs for n in (2, LARGE)):
            if options["power"] == 0.5 and not structure(2).closed_under_transpose:
                raise ValueError(
                    f"structures: expected one that is closed under transposition where power is "
                    f"0.5, since roots are symmetric, got {structure}"
                )

    def structures(
        self, name: str, shape: Sequence[int], input_structure: str | None, options: Options
    ) -> tuple[Structure, ...]:
        """One for each mode, the last one for all that follow."""
        specs = _specs(options["structures"])
        return tuple(
            within_limit(specs[min(i, len(specs) - 1)], n, name, options)
            for i, n in enumerate(shape)
        )

    def init(
        self, shape: Sequence[int], structures: Sequence[Structure], options: Options, **like: Any
    ) -> Modes:
        """Identities, in float32 at least."""
        like = wide(like)
        return Modes(tuple(s.identity(n, **like) for s, n in zip(structures, shape, strict=True)))

    def update(self, factors: Modes, statistics: Tensor, options: Options, step: int) -> Modes:
        """The damping is relative to ``mean(G^2)``; factors start where ``||Y||^2 = d``."""
        G = statistics.to(factors.K[0].dtype)
        mean = G.flatten(1).square().mean(1)
        K = [first_scale(K_i, mean) ** (1 / len(factors.K)) * K_i for K_i in factors.K]
        H = curvatures(K, whiten(K, G), options["damping"] * mean)
        return Modes(factor_steps(K, H, lr_cov(options, step) * is_measured(mean).to(mean)))

    def products(self, factors: Modes, options: Options) -> Products:
        """``S_i^-p`` of every mode, by its number."""
        if options["power"] == 0.5:
            return {f"{i}": symmetric_root(K) for i, K in enumerate(factors.K)}
        found = {f"{i}": product_of(K) for i, K in enumerate(factors.K)}
        return {name: P for name, P in found.items() if P is not None}

    def precondition(self, factors: Modes, G: Tensor, products: Products) -> Tensor:
        """``G x_1 S_1^-p ... x_k S_k^-p``; without a product ``S^-1`` is ``K K^T``."""
        D = G.to(factors.K[0].dtype)
        for i, K in enumerate(factors.K):
            D = D.reshape(*K.batch_shape, K.n, -1)
            D = apply_outer(K, products.get(f"{i}"), D).mT
        return D.reshape(G.shape).to(G.dtype)


def _specs(structures: Any) -> tuple[Any, ...]:
    """The structures of the modes, of one for all or of a tuple."""
    return tuple(structures) if isinstance(structures, tuple | list) else (structures,)


# Formulas ----------------------------------------------------------------------------------------


def whiten(K: Sequence[StructuredMatrix], G: Tensor) -> Tensor:
    """``G x_1 K_1^T ... x_k K_k^T`` for ``G [..., d_1, ..., d_k]``; each mode in turn is first."""
    Y = G
    for K_i in K:
        Y = K_i.apply_transpose(Y.reshape(*K_i.batch_shape, K_i.n, -1)).mT
    return Y.reshape(G.shape)


def curvatures(
    K: Sequence[StructuredMatrix], Y: Tensor, damping: float | Tensor
) -> list[StructuredMatrix]:
    """``H_i`` of every mode from the whitened gradient ``Y [..., d_1, ..., d_k]``."""
    grams, H = [K_i.gram() for K_i in K], []
    means = [Q.trace() / Q.n for Q in grams]
    for i, Q in enumerate(grams):
        Y = Y.reshape(*Q.batch_shape, Q.n, -1)
        others = math.prod(means[:i] + means[i + 1 :])
        H.append(K[i].project_gram(Y) * (1 / Y.shape[-1]) + (damping * others) * Q)
        Y = Y.mT
    return H


def factor_steps(
    K: Sequence[StructuredMatrix], H: Sequence[StructuredMatrix], step_size: float | Tensor
) -> tuple[StructuredMatrix, ...]:
    """``K_i (I - beta_1 m_i)`` with ``m_i = (H_i - I) / 2``, all shortened alike if one is long.

    ``tr(m_i) / d_i`` is the same for every mode, so that factors share the scale of S evenly, and
    none loses its inverse.
    """
    m = [0.5 * H_i.add_scaled_identity(-1.0) for H_i in H]
    longest = torch.stack([m_i.frobenius_norm() for m_i in m]).amax(0)
    beta_1 = step_size / longest.clamp(min=1.0)
    return tuple(K_i - beta_1 * (K_i @ m_i) for K_i, m_i in zip(K, m, strict=True))


def symmetric_root(K: StructuredMatrix) -> StructuredMatrix:
    """``(K K^T)^(1/2)`` of invertible members closed under transposition, by products alone.

    It is ``K U^T`` with the orthogonal factor U of the polar decomposition. First iterations of
    order five take singular values down to 1e-5 of ``||K||_F`` near one (Jordan et al., "Muon",
    2024), then Newton-Schulz iterations converge (Higham, "Functions of Matrices", Section 8.3).
    That loses half as many digits as a root of ``K K^T`` would.
    """
    if isinstance(K, Diagonal):
        return K.map(torch.abs)
    X = (1 / K.frobenius_norm()) * K
    for a, b, c in (GROW,) * 10 + (CONVERGE,) * 6:
        XX = X @ X.mT
        P = b * XX if c == 0 else b * XX + c * (XX @ XX)
        X = P.add_scaled_identity(a) @ X
    return K @ X.mT
