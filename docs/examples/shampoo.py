r"""
Inverse-free Shampoo
====================

The optimizer of the next example, on the public names of :mod:`structured` alone: root-free,
inverse-free Shampoo with structured factors, for parameters of any order.

**The model.** A parameter of shape :math:`d_1 \times \dots \times d_k`, with :math:`d` entries, has
a Gaussian posterior whose covariance is a Kronecker product
:math:`S^{-1} = S_1^{-1} \otimes \dots \otimes S_k^{-1}`, and :math:`S_i^{-1} = K_i K_i^T` with
:math:`K_i` in a structure of our choice. The Hessian is estimated by the gradient's outer product,
:math:`B\,g g^T` for the mean gradient of :math:`B` samples, plus a damping :math:`\lambda I`.
Up to a factor, the variational free energy is then, with the *whitened gradient*
:math:`Y = \sqrt{B}\; G \times_1 K_1^T \dots \times_k K_k^T`,

.. math:: f(K) = \tfrac12 \|Y\|^2 + \tfrac\lambda2 \prod_j \|K_j\|^2
                 - \sum_i \tfrac{d}{d_i} \log |\det K_i| .

**The step.** Put :math:`K_i \to K_i (I + m)`. To first order :math:`f` changes by
:math:`\frac{d}{d_i} \langle H_i - I, m \rangle`, where

.. math:: H_i = \tfrac{d_i}{d}\, Y_{(i)} Y_{(i)}^T
                + \lambda \prod_{j \ne i} \tfrac{\|K_j\|^2}{d_j}\; K_i^T K_i

and :math:`Y_{(i)}` is :math:`Y` with mode :math:`i` as rows. The Fisher metric of the Gaussian is
:math:`\frac{d}{2 d_i} \|m + m^T\|^2`, so the natural gradient solves
:math:`P(m + m^T) = P(H_i - I)` in the structure, which is what the projection :math:`\Pi` does:

.. math:: m_i = \tfrac12 \left( \Pi(H_i) - I \right), \qquad K_i \leftarrow K_i (I - \beta_1 m_i),
          \qquad W \leftarrow W - \beta_2\, G \times_1 K_1 K_1^T \dots \times_k K_k K_k^T .

For dense factors this is, to first order in :math:`\beta_1`, root-free Shampoo: the moving average
:math:`S_i \leftarrow (1 - \beta_1) S_i + \beta_1 K_i^{-T} H_i K_i^{-1}`, which for a matrix reads
:math:`S_1 \leftarrow (1 - \beta_1) S_1 + \beta_1 \frac{1}{d_2} G S_2^{-1} G^T`. Neither a root nor
an inverse is taken.

**Scale.** :math:`\operatorname{tr} m_i / d_i = \frac12 (\|Y\|^2 / d + \dots - 1)` is the same for
every mode: the factors share the scale of :math:`S` evenly, and where they are stationary
:math:`\|Y\|^2 \le d`. This gives the three bounds below without a new unit: factors begin where the
first gradient has :math:`\|Y\|^2 \le d`; a step of a factor has norm at most :math:`\beta_1 < 1`,
so that it stays invertible; and a :math:`Y` longer than ``clip`` :math:`\sqrt d`, which the factors
have not yet seen the like of, is shortened to that. As
:math:`\langle \Delta, S \Delta \rangle \propto \|Y\|^2` for the descent direction :math:`\Delta`,
this is a trust region.

Source: Lin et al., "Can We Remove the Square-Root in Adaptive Gradient Methods? A Second-Order
Perspective", ICML 2024, arXiv 2402.03496, Figure 3. Its momentum of the factors is left out; the
initial value and the clipping are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from structured import StructuredMatrix, StructureLike, parse

Factors = Sequence[StructuredMatrix]


def whiten(factors: Factors, G: Tensor) -> Tensor:
    """``G x_1 K_1^T ... x_k K_k^T`` for ``G [d_1, ..., d_k]``.

    Each mode in turn is the first; after the last, all are back in their places.
    """
    Y = G
    for K in factors:
        Y = K.apply_transpose(Y.reshape(K.n, -1)).mT
    return Y.reshape(G.shape)


def unwhiten(factors: Factors, Y: Tensor) -> Tensor:
    """``Y x_1 K_1 ... x_k K_k``; after :func:`whiten`, the product with ``S^{-1}``."""
    G = Y
    for K in factors:
        G = K.apply(G.reshape(K.n, -1)).mT
    return G.reshape(Y.shape)


def curvatures(factors: Factors, Y: Tensor, damping: float) -> list[StructuredMatrix]:
    """``Pi(H_i)`` of every mode from the whitened gradient ``Y [d_1, ..., d_k]``."""
    d, H = Y.numel(), []
    grams = [K.gram() for K in factors]
    means = [KK.trace() / KK.n for KK in grams]
    for i, (K, KK) in enumerate(zip(factors, grams, strict=True)):
        others = math.prod(means[:i] + means[i + 1 :])
        Y = Y.reshape(K.n, -1)
        H.append(K.project_gram(Y) * (K.n / d) + (damping * others) * KK)
        Y = Y.mT
    return H


def factor_steps(factors: Factors, H: Factors, lr_cov: float) -> list[StructuredMatrix]:
    """``K_i (I - beta_1 m_i)`` with ``m_i = (H_i - I) / 2``, all shortened alike if one is long."""
    m = [0.5 * H_i.add_scaled_identity(-1.0) for H_i in H]
    longest = torch.stack([m_i.frobenius_norm() for m_i in m]).max()
    beta_1 = lr_cov / longest.clamp(min=1.0)
    return [K - beta_1 * (K @ m_i) for K, m_i in zip(factors, m, strict=True)]


def first_factors(
    G: Tensor, structures: StructureLike | tuple[StructureLike, ...], damping: float
) -> list[StructuredMatrix]:
    """Equal multiples of the identity for which ``||Y||^2 <= d``, one for each mode of ``G``."""
    specs = structures if isinstance(structures, tuple) else (structures,)
    specs += specs[-1:] * (G.ndim - len(specs))
    scale = (G.square().mean() + damping) ** (-0.5 / G.ndim)
    return [
        scale * parse(spec).identity(n, dtype=G.dtype, device=G.device)
        for spec, n in zip(specs, G.shape, strict=False)
    ]


def shorten(Y: Tensor, clip: float) -> Tensor:
    """``Y``, scaled down if its root mean square exceeds ``clip``."""
    return Y * (clip / Y.square().mean().sqrt().clamp(min=clip))


class InverseFreeShampoo(torch.optim.Optimizer):
    """Structured root-free, inverse-free Shampoo.

    >>> optimizer = InverseFreeShampoo(model.parameters(), structures=("dense", "diagonal"))

    Modes of size 1 are left out; every other mode has a factor, in float32 at least.

    Args:
        params: Parameters of any order, or groups of them.
        lr: Step size of the parameters (beta_2).
        structures: The structure of all factors, or a tuple for the first, second, ... mode left
            (the last serves all that follow): specs, classes, or callables ``n -> zero member``,
            which may choose by the size.
        batch_size: Samples ``B`` that a gradient is the mean of; 1 if it is a sum.
        damping: Damping lambda, in units of ``B g^2``; positive.
        lr_cov: Step size of the factors (beta_1), in (0, 1).
        momentum: Momentum of the parameters, in [0, 1).
        weight_decay: Added to the preconditioned gradient, times the parameter.
        clip: Bound on the root mean square of the whitened gradient.
        T: Steps between two updates of the factors.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        structures: StructureLike | tuple[StructureLike, ...] = "dense",
        batch_size: int = 1,
        damping: float = 1e-4,
        lr_cov: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        clip: float = 1.0,
        T: int = 1,
    ) -> None:
        if damping <= 0 or not 0 < lr_cov < 1 or not 0 <= momentum < 1 or batch_size < 1 or T < 1:
            raise ValueError(
                "InverseFreeShampoo: expected damping > 0, 0 < lr_cov < 1, 0 <= momentum < 1, "
                f"batch_size >= 1, T >= 1, got {damping}, {lr_cov}, {momentum}, {batch_size}, {T}"
            )
        defaults = {
            "lr": lr,
            "structures": structures,
            "batch_size": batch_size,
            "damping": damping,
            "lr_cov": lr_cov,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "clip": clip,
            "T": T,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the factors and the parameters; returns the loss if given a ``closure``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, p.grad, self.state[p], group)
        return loss

    def _move(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        wide = torch.promote_types(p.dtype, torch.float32)
        scale = math.sqrt(group["batch_size"])
        G = scale * torch.atleast_1d(grad.squeeze()).to(wide)
        if not state:
            state["step"], state["buffer"] = 0, torch.zeros_like(p, dtype=wide)
            state["factors"] = first_factors(G, group["structures"], group["damping"])
        factors = state["factors"]
        if state["step"] % group["T"] == 0:
            H = curvatures(factors, whiten(factors, G), group["damping"])
            factors = state["factors"] = factor_steps(factors, H, group["lr_cov"])
        Y = shorten(whiten(factors, G), group["clip"])
        direction = unwhiten(factors, Y).reshape(p.shape) / scale
        state["step"] += 1
        state["buffer"].mul_(group["momentum"]).add_(direction + group["weight_decay"] * p)
        p.sub_(group["lr"] * state["buffer"])
