r"""
Inverse-free Shampoo
====================

A second-order method in one file: root-free, inverse-free Shampoo for parameters of any order.

The curvature of a parameter with gradient :math:`G \; [d_1, \dots, d_k]`, :math:`d` numbers, is the
Kronecker product of :math:`S_i = (K_i K_i^T)^{-1}`. With the *whitened gradient* :math:`Y = G
\times_1 K_1^T \dots \times_k K_k^T` and its unfoldings :math:`Y_{(i)}`, the free energy

.. math:: \tfrac12 \|Y\|^2 + \tfrac\lambda2 \prod_j \|K_j\|^2 - \sum_i \tfrac{d}{d_i} \log |K_i|

changes by :math:`\frac{d}{d_i} \langle H_i - I, m \rangle` for :math:`K_i \to K_i (I + m)`, where

.. math:: H_i = \tfrac{d_i}{d} Y_{(i)} Y_{(i)}^T
   + \lambda \prod_{j \ne i} \tfrac{\|K_j\|^2}{d_j} K_i^T K_i ,

so that a step along its natural gradient needs no root and no inverse:

.. math:: m_i = \tfrac12 (\Pi(H_i) - I), \quad K_i \leftarrow K_i (I - \beta_1 m_i), \quad
   D = G \times_1 K_1 K_1^T \dots \times_k K_k K_k^T .

Source: Lin et al., "Can We Remove the Square-Root in Adaptive Gradient Methods?", ICML 2024, arXiv
2402.03496, Figure 3, without momentum of the factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from singd import Factors, KroneckerOptimizer, Method
from singd.update import first_scale, is_measured
from structured import StructuredMatrix, parse


@dataclass(frozen=True)
class Modes(Factors):
    """One factor for each mode."""

    K: tuple[StructuredMatrix, ...]


def whiten(K: Sequence[StructuredMatrix], G: Tensor) -> Tensor:
    """``G x_1 K_1^T ... x_k K_k^T`` for ``G [..., d_1, ..., d_k]``; each mode in turn is first."""
    Y = G
    for K_i in K:
        Y = K_i.apply_transpose(Y.reshape(*K_i.batch_shape, K_i.n, -1)).mT
    return Y.reshape(G.shape)


def unwhiten(K: Sequence[StructuredMatrix], Y: Tensor) -> Tensor:
    """``Y x_1 K_1 ... x_k K_k``; after :func:`whiten`, the product with ``S^{-1}``."""
    return whiten([K_i.mT for K_i in K], Y)


def curvatures(K: Sequence[StructuredMatrix], Y: Tensor, damping: Any) -> list[StructuredMatrix]:
    """``Pi(H_i)`` of every mode from the whitened gradient ``Y [..., d_1, ..., d_k]``."""
    grams, H = [K_i.gram() for K_i in K], []
    means = [Q.trace() / Q.n for Q in grams]
    for i, Q in enumerate(grams):
        Y = Y.reshape(*Q.batch_shape, Q.n, -1)
        others = math.prod(means[:i] + means[i + 1 :])
        H.append(K[i].project_gram(Y) * (1 / Y.shape[-1]) + (damping * others) * Q)
        Y = Y.mT
    return H


def factor_steps(
    K: Sequence[StructuredMatrix], H: Sequence[StructuredMatrix], lr_cov: float | Tensor
) -> tuple[StructuredMatrix, ...]:
    """``K_i (I - beta_1 m_i)`` with ``m_i = (H_i - I) / 2``, all shortened alike if one is long."""
    m = [0.5 * H_i.add_scaled_identity(-1.0) for H_i in H]
    longest = torch.stack([m_i.frobenius_norm() for m_i in m]).amax(0)
    beta_1 = lr_cov / longest.clamp(min=1.0)
    return tuple(K_i - beta_1 * (K_i @ m_i) for K_i, m_i in zip(K, m, strict=True))


class StructuredShampoo(Method):
    """Root-free, inverse-free Shampoo."""

    needs_activations = False

    def structures(self, name: str, shape: Any, fixed: Any, options: Any) -> Any:
        """The last structure serves all modes that follow."""
        specs = options["structures"]
        specs = specs if isinstance(specs, tuple) else (specs,)
        return tuple(parse(specs[min(i, len(specs) - 1)]) for i in range(len(shape)))

    def init(self, shape: Any, structures: Any, options: Any, **like: Any) -> Modes:
        """Identities, in float32 at least."""
        like["dtype"] = torch.promote_types(like["dtype"], torch.float32)
        return Modes(tuple(s.identity(n, **like) for s, n in zip(structures, shape, strict=True)))

    def update(self, factors: Modes, statistics: Tensor, options: Any, step: int) -> Modes:
        """The damping is relative to ``g^2``: K stays at zeros, and starts at ``||Y||^2 = d``."""
        G = statistics.to(factors.K[0].dtype)
        mean = G.flatten(1).square().mean(1)
        K = [first_scale(K_i, mean) ** (1 / len(factors.K)) * K_i for K_i in factors.K]
        H = curvatures(K, whiten(K, G), options["damping"] * mean)
        return Modes(factor_steps(K, H, options["lr_cov"] * is_measured(mean).to(mean)))

    def precondition(self, factors: Modes, G: Tensor, products: Any) -> Tensor:
        """``G x_1 K_1 K_1^T ... x_k K_k K_k^T``."""
        return unwhiten(factors.K, whiten(factors.K, G.to(factors.K[0].dtype))).to(G.dtype)


class Shampoo(KroneckerOptimizer):
    """The optimizer; ``structures``: that of all modes, or a tuple for the first, second, ..."""

    def __init__(
        self, model: nn.Module, params: Any = None, *, structures: Any = "dense", **options: Any
    ) -> None:
        defaults = {"structures": structures, "damping": 1e-4, "lr_cov": 0.1, "T": 1, **options}
        super().__init__(model, StructuredShampoo(), params, defaults)
