"""The paper's step as pure functions. Read beside arXiv 2312.05705 (Figure 3) and arXiv 2302.09738.

One layer: weight ``W [d_out, d_in]`` with gradient ``G``, inputs ``A [d_in, R]`` and output
gradients ``B [d_out, R]`` scaled so that ``A A^T`` and ``B B^T`` are the Kronecker factors.

=========  ==========================================  ==============
letter     meaning                                     argument
=========  ==========================================  ==============
S_K, S_C   Kronecker factors of the curvature
K, C       inverse square roots, ``K K^T ~ S_K^-1``    ``structures``
m_K, m_C   Riemannian momenta of K and C
H_K, H_C   ``Pi(K^T S_K K)``, ``Pi(C^T S_C C)``
Pi         projection onto the structure               ``structures``
lambda     damping; relative: in units of
           ``mean(S_K) mean(S_C)``                     ``damping``
beta_1     step size of K and C                        ``lr_cov``
beta_2     step size of W                              ``lr``
alpha_1    Riemannian momentum                         ``alpha1``
alpha_2    momentum of W                               ``momentum``
gamma      weight decay                                ``weight_decay``
T          steps between two updates of K and C        ``T``
=========  ==========================================  ==============

Every T steps (Figure 3, with ``mean(M) = tr(M) / n``; C alike, with K and C exchanged)::

    H_K = Pi(K^T A A^T K)
    IKFAC   m_K = 1/2 (H_K + lambda Pi(K^T K) - I)
    SINGD   m_K = alpha_1 m_K + 1/2 (mean(H_C) H_K + lambda mean(C^T C) Pi(K^T K) - I)
    K <- K (I - beta_1 m_K)

where under ``scale_init`` a K that is still the identity becomes ``mean(S_K)^(-1/2) I`` first, and
under relative damping K stays where S is nothing (:func:`is_measured`). Every step ``b <- alpha_2 b
+ C C^T G K K^T + gamma W``, ``W <- W - beta_2 b``. All factors may carry batch dimensions: equal
layers, or the groups of a convolution, side by side.
:mod:`singd.methods.batched` is the same for many layers of any size at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from structured import StructuredMatrix

Number = Callable[[StructuredMatrix], Tensor]
Means = tuple[Number, Number]


def statistic(K: StructuredMatrix, A: Tensor) -> StructuredMatrix:
    """What to sum over backward passes, of ``A [..., n, R]``: enough to find ``Pi(K^T A A^T K)``.

    Where that depends on ``Pi(A A^T)`` alone, so for all structures closed under transposition, it
    is that; any other needs ``Pi(K^T A A^T K)`` itself.
    """
    return K.project_gram(A) if K.closed_under_congruence else whitened(K, A)


def whitened(K: StructuredMatrix, A: Tensor) -> StructuredMatrix:
    """``Pi(K^T A (K^T A)^T)``: K is applied to the columns, whatever the structure.

    That bears rounding best. With c the condition number of ``S + lambda I`` and e the rounding of
    one product, the error of ``K^T A`` is e c^(1/2), and H stays positive; that of ``K^T S K`` is
    e c, with any sign.
    """
    return K.project_gram(K.apply_transpose(A))


def curvature(K: StructuredMatrix, U: StructuredMatrix) -> StructuredMatrix:
    """``H_K = Pi(K^T S K)`` from the :func:`statistic` ``U`` of ``S``."""
    return K.congruence(U) if K.closed_under_congruence else U


def ikfac(K: StructuredMatrix, H_K: StructuredMatrix, damping: float | Tensor) -> StructuredMatrix:
    """IKFAC: ``m_K = 1/2 (H_K + lambda Pi(K^T K) - I)``; the same for C."""
    return 0.5 * (H_K + damping * K.gram()).add_scaled_identity(-1.0)


def singd(
    K: StructuredMatrix,
    C: StructuredMatrix,
    H_K: StructuredMatrix,
    H_C: StructuredMatrix,
    damping: float | Tensor,
    means: Means | None = None,
) -> tuple[StructuredMatrix, StructuredMatrix]:
    """INGD and SINGD: the new terms of both momenta.

    ``1/2 (mean(H_C) H_K + lambda mean(C^T C) Pi(K^T K) - I)``, and K and C exchanged.

    Args:
        K: Factor of the inputs.
        C: Factor of the output gradients.
        H_K: Curvature of K.
        H_C: Curvature of C.
        damping: Damping lambda.
        means: The means of members of K and of C; :func:`mean`, unless other processes have a part.
    """
    KK, CC = K.gram(), C.gram()
    mean_K, mean_C = means or (mean, mean)
    m_K = mean_C(H_C) * H_K + (damping * mean_C(CC)) * KK
    m_C = mean_K(H_K) * H_C + (damping * mean_K(KK)) * CC
    return 0.5 * m_K.add_scaled_identity(-1.0), 0.5 * m_C.add_scaled_identity(-1.0)


def mean(H: StructuredMatrix) -> Tensor:
    """``tr(H) / n``, ``[...]``."""
    return H.trace() / max(H.n, 1)


def first_scale(
    K: StructuredMatrix, mean_S: Tensor, max_abs: Number = StructuredMatrix.max_abs
) -> Tensor:
    """``mean(S)^(-1/2)`` where ``K`` is still the identity, 1 where it is not, ``[...]``.

    With it the first curvature is of size one whatever the units of inputs and gradients.
    """
    limit = torch.finfo(K.dtype).max ** 0.5
    is_first = (max_abs(K.add_scaled_identity(-1.0)) == 0) & is_measured(mean_S)
    return torch.where(is_first, mean_S.rsqrt().clamp(1 / limit, limit), 1.0)


def is_measured(mean_S: Tensor) -> Tensor:
    """Whether ``mean(S)`` is large enough for a factor to follow S, ``[...]``.

    That of a layer without gradients is not: ``K K^T`` would grow without end towards ``S^-1``. Nor
    is one so small that the norm of a direction of ``1/eps`` numbers would overflow.
    """
    info = torch.finfo(mean_S.dtype)
    return mean_S > info.tiny / info.eps


def factor_step(
    K: StructuredMatrix, m_K: StructuredMatrix, lr_cov: float | Tensor
) -> StructuredMatrix:
    """``K (I - beta_1 m_K)``, the exponential map of the group to first order."""
    return K - lr_cov * K.matmul(m_K)


def normalize_lr_cov(
    lr_cov: float, m_K: StructuredMatrix, max_abs: Number = StructuredMatrix.max_abs
) -> Tensor:
    """``beta_1 / max(1, ||m_K||_max)``: normalized gradient descent on the factors, ``[...]``."""
    return lr_cov / max_abs(m_K).clamp(min=1.0)


def clip_lr_cov(
    lr_cov: float | Tensor,
    m_K: StructuredMatrix,
    bound: float,
    mean: Number = mean,
    norm: Number = StructuredMatrix.frobenius_norm,
) -> Tensor:
    """``beta_1``, smaller where ``||beta_1 m_K||_2`` might exceed ``bound``, ``[...]``.

    Below 1, ``I - beta_1 m_K`` is invertible, and so K stays: in range whatever the scale of the
    inputs. The spectral norm is bounded by ``|t| + ||m_K - t I||_F`` with ``t = tr(m_K) / n``,
    which is sharp for multiples of the identity.
    """
    t = mean(m_K)
    total = t.abs() + norm(m_K.add_scaled_identity(-t))
    return lr_cov * (bound / (lr_cov * total).clamp(min=bound))


def resolve_damping(c: float | Tensor, a: float | Tensor, norm: Tensor) -> Tensor:
    """``c``, or what products with S resolve beside ``a S`` if that is more, ``[...]``.

    Rounding moves eigenvalues of S by about ``e ||S||_F``, up or down. A smaller c would leave
    ``K^T (a S + c I) K`` indefinite, and K would grow without end.

    Args:
        c: Damping, a number or ``[...]``.
        a: Factor of S, a number or ``[...]``.
        norm: Frobenius norm of S, ``[...]``.
    """
    return (a * norm * (8 * torch.finfo(norm.dtype).eps)).clamp(min=c)


def precondition(K: StructuredMatrix, C: StructuredMatrix, G: Tensor) -> Tensor:
    """The preconditioned gradient ``C C^T G K K^T`` for ``G [..., d_out, d_in]``."""
    GKK = K.apply(K.apply_transpose(G.mT)).mT
    return C.apply(C.apply_transpose(GKK))


def kl_scale(kl_clip: float, quadratic: Tensor) -> Tensor:
    """``nu = min(1, sqrt(kappa / q))`` with ``q = sum beta_2^2 <preconditioned, gradient>``.

    Bounds the (quadratic) KL divergence of a step by ``kappa``. Source: KFAC's trust region, as in
    Ba et al., "Distributed Second-Order Optimization using Kronecker-Factored Approximations",
    ICLR 2017, Section 5. A tensor, so that no step waits for the device.
    """
    tiny = torch.finfo(quadratic.dtype).tiny
    return (kl_clip / quadratic.clamp(min=tiny)).sqrt().clamp(max=1.0)


def kfac_average(S: StructuredMatrix, new: StructuredMatrix, lr_cov: float) -> StructuredMatrix:
    """KFAC: ``(1 - beta_1) S + beta_1 new``."""
    return (1.0 - lr_cov) * S + lr_cov * new


def kfac_inverse(S: Tensor, damping: float) -> Tensor:
    """KFAC: ``(S + lambda I)^-1`` for ``S [..., n, n]``, by Cholesky in float32 at least.

    The damping counts as what rounding resolves beside S, if that is more. NaN where
    ``S + lambda I`` is not positive definite: an error would wait for the device.
    """
    wide = S.to(torch.promote_types(S.dtype, torch.float32))
    resolved = resolve_damping(damping, 1.0, torch.linalg.matrix_norm(wide))
    eye = torch.eye(S.shape[-1], dtype=wide.dtype, device=S.device)
    L, info = torch.linalg.cholesky_ex(wide + resolved[..., None, None] * eye)
    return torch.cholesky_inverse(L.masked_fill((info != 0)[..., None, None], torch.nan))
