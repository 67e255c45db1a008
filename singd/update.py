"""The paper's step as pure functions. Read beside arXiv 2312.05705 (Figure 3) and arXiv 2302.09738.

One layer: weight ``W [d_out, d_in]`` with gradient ``G``, inputs ``A [d_in, R]`` and output
gradients ``B [d_out, R]`` scaled so that ``A A^T`` and ``B B^T`` are the Kronecker factors.

=========  ==========================================  ==============
letter     meaning                                     argument
=========  ==========================================  ==============
S_K, S_C   Kronecker factors of the curvature
K, C       inverse square roots, ``K K^T ~ S_K^-1``
m_K, m_C   Riemannian momenta of K and C
H_K, H_C   ``Pi(K^T S_K K)``, ``Pi(C^T S_C C)``
Pi         projection onto the structure
lambda     damping                                     ``damping``
beta_1     step size of K and C                        ``lr_cov``
beta_2     step size of W                              ``lr``
alpha_1    Riemannian momentum                         ``alpha1``
alpha_2    momentum of W                               ``momentum``
gamma      weight decay                                ``weight_decay``
T          steps between two updates of K and C        ``T``
=========  ==========================================  ==============

All factors may carry batch dimensions: equal layers, or the groups of a convolution, side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from singd.rounding import leading
from structured import Diagonal, Kronecker, Operator, StructuredMatrix


def mean_trace(H: StructuredMatrix) -> Tensor:
    """``tr(H) / n``, ``[...]``."""
    return H.trace() / max(H.n, 1)


def statistic(K: StructuredMatrix, A: Tensor) -> StructuredMatrix:
    """What to sum over backward passes, of ``A [..., n, R]``: enough to find ``Pi(K^T A A^T K)``.

    Where that depends on ``Pi(A A^T)`` alone, so for all structures closed under transposition,
    K is applied once, by :func:`curvature`; any other needs ``Pi(K^T A A^T K)`` itself.
    """
    return K.project_gram(A if K.closed_under_congruence else K.apply_transpose(A))


def curvature(K: StructuredMatrix, U: StructuredMatrix) -> StructuredMatrix:
    """``H_K = Pi(K^T S K)`` from the :func:`statistic` ``U`` of ``S``."""
    return K.congruence(U) if K.closed_under_congruence else U


def ikfac_momentum(
    K: StructuredMatrix, H_K: StructuredMatrix, damping: float | Tensor
) -> StructuredMatrix:
    """IKFAC: ``m_K = 1/2 (H_K + lambda Pi(K^T K) - I)``; the same for C."""
    return 0.5 * (H_K + damping * K.gram()).add_scaled_identity(-1.0)


def singd_momenta(
    K: StructuredMatrix,
    C: StructuredMatrix,
    H_K: StructuredMatrix,
    H_C: StructuredMatrix,
    damping: float | Tensor,
) -> tuple[StructuredMatrix, StructuredMatrix]:
    """INGD and SINGD: the new terms of both momenta.

    ``1/2 (tr(H_C)/d_out H_K + lambda tr(C^T C)/d_out Pi(K^T K) - I)``, and K and C exchanged.
    """
    KK, CC = K.gram(), C.gram()
    h_K, h_C, k, c = (0.5 * mean_trace(H) for H in (H_K, H_C, KK, CC))
    m_K = _weighted_sum_(damping * c, KK, h_C, H_K)
    m_C = _weighted_sum_(damping * k, CC, h_K, H_C)
    return m_K.add_scaled_identity(-0.5), m_C.add_scaled_identity(-0.5)


def residual(K: StructuredMatrix, U: StructuredMatrix, damping: float) -> Tensor:
    """``||Pi(K^T (S + lambda I) K) - I||_F``, ``[...]``: zero at the best K of its structure."""
    H = curvature(K, U) + damping * K.gram()
    return H.add_scaled_identity(-1.0).frobenius_norm()


def factor_step(
    K: StructuredMatrix, m_K: StructuredMatrix, lr_cov: float | Tensor
) -> StructuredMatrix:
    """``K (I - beta_1 m_K)``, the exponential map of the group to first order."""
    return _weighted_sum_(-lr_cov, K.matmul(m_K), 1.0, K)


def normalized(lr_cov: float, m_K: StructuredMatrix) -> Tensor:
    """``beta_1 / max(1, ||m_K||_max)``: normalized gradient descent on the factors, ``[...]``."""
    return lr_cov / m_K.max_abs().clamp(min=1.0)


def clipped(lr_cov: float | Tensor, m_K: StructuredMatrix, bound: float) -> Tensor:
    """``beta_1``, smaller where ``||beta_1 m_K||_2`` might exceed ``bound``, ``[...]``.

    Below 1, ``I - beta_1 m_K`` is invertible, and so K stays: in range whatever the scale of the
    inputs. The spectral norm is bounded by ``|t| + ||m_K - t I||_F`` with ``t = tr(m_K) / n``,
    which is sharp for multiples of the identity.
    """
    t = mean_trace(m_K)
    norm = t.abs() + m_K.add_scaled_identity(-t).frobenius_norm()
    return lr_cov * (bound / (lr_cov * norm).clamp(min=bound))


# The same step on the products P_K = K K^T and P_C = C C^T, where they are kept: K m_K needs no
# product but W K, with W = P_K (a S_K + c I), since tr(H_K) = tr(P_K S_K) and W is similar to
# H = K^T (a S_K + c I) K. Three products of size n in place of six, for structures closed under
# transposition. What goes in is V = P S; where rows are few it is summed in place of S, and then
# there are two.


def product_statistic(P: StructuredMatrix, A: Tensor) -> StructuredMatrix:
    """``V = P A A^T`` of ``A [..., n, R]``, dense: ``2 n^2 R`` and no product of size n."""
    return P.with_tensors([P.apply(A) @ A.mT])


def singd_weights(
    P_K: StructuredMatrix,
    P_C: StructuredMatrix,
    V_K: StructuredMatrix,
    V_C: StructuredMatrix,
    damping: float | Tensor,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """``(a, c)`` of K and of C in INGD and SINGD: ``tr(H_C)/d_out`` and ``lambda tr(C^T C)/d_out``.

    In IKFAC they are 1 and lambda.
    """
    a_K, a_C = mean_trace(V_C), mean_trace(V_K)
    return (a_K, damping * mean_trace(P_C)), (a_C, damping * mean_trace(P_K))


def product_curvature(
    P: StructuredMatrix, V: StructuredMatrix, a: float | Tensor, c: float | Tensor
) -> StructuredMatrix:
    """``W = P (a S + c I)``, similar to ``H = K^T (a S + c I) K``; in the memory of ``V = P S``."""
    return _weighted_sum_(a, V, c, P)


def product_clipped(lr_cov: float, W: StructuredMatrix, bound: float) -> Tensor:
    """:func:`clipped` for ``m_K = 1/2 (H - I)``, from the similar ``W``."""
    n, trace = max(W.n, 1), W.trace()
    spread = (W.trace_product(W) - trace.square() / n).clamp(min=0.0)
    norm = 0.5 * ((trace / n - 1).abs() + spread.sqrt())
    return lr_cov * (bound / (lr_cov * norm).clamp(min=bound))


def product_residual(P: StructuredMatrix, V: StructuredMatrix, damping: float) -> Tensor:
    """:func:`residual` from ``V = P S``: ``V + lambda P - I`` is similar to what it measures."""
    W = (V + damping * P).add_scaled_identity(-1.0)
    return W.trace_product(W).clamp(min=0.0).sqrt()


def product_factor_step(
    K: StructuredMatrix, W: StructuredMatrix, lr_cov: float | Tensor
) -> StructuredMatrix:
    """``K (I - beta_1 m_K) = (1 + beta_1 / 2) K - beta_1 / 2 W K``."""
    return _weighted_sum_(-0.5 * lr_cov, W.matmul(K), 1 + 0.5 * lr_cov, K)


def _weighted_sum_(
    a: float | Tensor, X: StructuredMatrix, b: float | Tensor, Y: StructuredMatrix
) -> StructuredMatrix:
    """``a X + b Y`` in the memory of X: fresh memory takes longer than the sum."""

    def sum_(x: Tensor, y: Tensor) -> Tensor:
        x.mul_(leading(a, x) if isinstance(a, Tensor) else a)
        return x.addcmul_(y, leading(b, y)) if isinstance(b, Tensor) else x.add_(y, alpha=b)

    return X.map(sum_, Y)


def precondition(
    K: StructuredMatrix,
    C: StructuredMatrix,
    G: Tensor,
    KK: Operator | None = None,
    CC: Operator | None = None,
) -> Tensor:
    """The natural gradient ``C C^T G K K^T`` for ``G [..., d_out, d_in]``.

    Half the cost where the products ``KK = K K^T`` and ``CC = C C^T`` are given.
    """
    if KK is not None and CC is not None:
        return precondition_products(KK, CC, G)
    X = G.mT
    GKK = (K.apply(K.apply_transpose(X)) if KK is None else KK.apply(X)).mT
    return C.apply(C.apply_transpose(GKK)) if CC is None else CC.apply(GKK)


def precondition_products(KK: Operator, CC: Operator, G: Tensor) -> Tensor:
    """The same from the products alone."""
    if isinstance(KK, Diagonal) and isinstance(CC, Diagonal):  # as few passes as there can be
        return (G * KK.d[..., None, :]).mul_(CC.d[..., None])
    return Kronecker(CC, KK).apply_matrix(G)


def precondition_apart(KK: Operator, CC: Operator, G: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The same for ``[G g]``, a weight and its bias ``g [..., d_out, 1]``, without joining them."""
    return Kronecker(CC, KK).apply_apart(G, g)


def inner(X: Tensor, Y: Tensor) -> Tensor:
    """``sum_ij X_ij Y_ij`` over all dimensions, in float32 at least."""
    wide = torch.promote_types(X.dtype, torch.float32)
    return torch.dot(X.flatten().to(wide), Y.flatten().to(wide))


def moving_average(S: StructuredMatrix, new: StructuredMatrix, lr_cov: float) -> StructuredMatrix:
    """KFAC: ``(1 - beta_1) S + beta_1 new``."""
    return (1.0 - lr_cov) * S + lr_cov * new


def damped_inverse(S: Tensor, damping: float) -> Tensor:
    """KFAC: ``(S + lambda I)^-1`` for ``S [..., n, n]``, by Cholesky in float32 at least.

    NaN where ``S + lambda I`` is not positive definite: an error would wait for the device.
    """
    wide = S.to(torch.promote_types(S.dtype, torch.float32))
    eye = torch.eye(S.shape[-1], dtype=wide.dtype, device=S.device)
    L, info = torch.linalg.cholesky_ex(wide + damping * eye)
    return torch.cholesky_inverse(L.masked_fill((info != 0)[..., None, None], torch.nan))


def trust_region(kl_clip: float, quadratic: Tensor) -> Tensor:
    """``nu = min(1, sqrt(kappa / q))`` with ``q = sum beta_2^2 <natural gradient, gradient>``.

    Bounds the (quadratic) KL divergence of a step by ``kappa``. Source: KFAC's trust region, as in
    Ba et al., "Distributed Second-Order Optimization using Kronecker-Factored Approximations",
    ICLR 2017, Section 5. A tensor, so that no step waits for the device.
    """
    tiny = torch.finfo(quadratic.dtype).tiny
    return (kl_clip / quadratic.clamp(min=tiny)).sqrt().clamp(max=1.0)
