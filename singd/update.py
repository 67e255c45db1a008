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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from singd.joint import jointly
from singd.rounding import kernels, leading
from structured import Dense, Diagonal, Kronecker, Operator, StructuredMatrix

_PIECE = 1 << 18  # numbers of low precision that are made wide at a time


def mean_trace(H: StructuredMatrix) -> Tensor:
    """``tr(H) / n``, ``[...]``."""
    return H.trace() / max(H.n, 1)


def statistic(K: StructuredMatrix, A: Tensor) -> StructuredMatrix:
    """What to sum over backward passes, of ``A [..., n, R]``: enough to find ``Pi(K^T A A^T K)``.

    Where that depends on ``Pi(A A^T)`` alone, so for all structures closed under transposition,
    K is applied once, by :func:`curvature`; any other needs ``Pi(K^T A A^T K)`` itself.
    """
    return K.project_gram(A) if K.closed_under_congruence else rooted_statistic(K, A)


def curvature(K: StructuredMatrix, U: StructuredMatrix) -> StructuredMatrix:
    """``H_K = Pi(K^T S K)`` from the :func:`statistic` ``U`` of ``S``."""
    return K.congruence(U) if K.closed_under_congruence else U


def rooted_statistic(K: StructuredMatrix, A: Tensor) -> StructuredMatrix:
    """``H_K = Pi(K^T A (K^T A)^T)``: K is applied to the rows, whatever the structure.

    That bears rounding best. With c the condition number of ``S + lambda I`` and e the rounding of
    one product, the error of ``K^T A`` is e c^(1/2), and H stays positive; that of ``K^T S K`` is
    e c, with any sign.
    """
    return K.project_gram(K.apply_transpose(A))


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
    weights = singd_weights([H_K, H_C], [KK.trace(), CC.trace()], damping)
    m_K, m_C = (
        0.5 * total_curvature(H, Q, a, c).add_scaled_identity(-1.0)
        for H, Q, (a, c) in zip((H_K.clone(), H_C.clone()), (KK, CC), weights, strict=True)
    )
    return m_K, m_C


def residual(K: StructuredMatrix, H_K: StructuredMatrix, damping: float) -> Tensor:
    """``||Pi(K^T (S + lambda I) K) - I||_F``, ``[...]``: zero at the best K of its structure."""
    return (H_K + damping * K.gram()).add_scaled_identity(-1.0).frobenius_norm()


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


# The same step for all factors at once, without the momentum m_K = 1/2 (X - I): X = a H + c Q is
# the curvature of a side with its damping. What is one number for each layer costs as much as a
# product of small factors if it is worked out layer by layer.
#
# X stands on the right of K and is made of H and Q = Pi(K^T K). Or, where products P = K K^T are
# kept, it stands on the left: X = P (a S + c I), similar to the other, is made of V = P S and
# Q = P, with the same traces. That spares a product of size n. Where rows are few V is summed in
# place of S, which spares another.


def product_statistic(P: StructuredMatrix, A: Tensor) -> StructuredMatrix:
    """``V = P A A^T`` of ``A [..., n, R]``, dense: ``2 n^2 R`` and no product of size n."""
    return P.with_tensors([P.apply(A) @ A.mT])


def singd_weights(
    H: Sequence[StructuredMatrix], traces: Sequence[Tensor], damping: float | Tensor
) -> list[tuple[Tensor, Tensor]]:
    """``(a, c)`` of K, C, K, C, ...: ``tr(H_C)/d_out`` and ``lambda tr(C^T C)/d_out`` for a K.

    In IKFAC they are 1 and lambda. ``traces`` are those of ``K^T K``, ``C^T C``, ...
    """
    sizes = [x.n for x in H]
    a = jointly(lambda h, n: h / n, sizes, [x.trace() for x in H])
    c = jointly(lambda q, n: q * (damping / n), sizes, traces)
    return [(a[i ^ 1].to(x.dtype), c[i ^ 1].to(x.dtype)) for i, x in enumerate(H)]


def gram_trace(K: StructuredMatrix) -> Tensor:
    """``tr Pi(K^T K) = ||K||_F^2``, ``[...]``: a structure that contains I keeps traces."""
    return K.frobenius_norm().square()


def resolved_damping(c: float | Tensor, a: float | Tensor, norm: Tensor) -> Tensor:
    """``c``, or what products with S resolve beside ``a S`` if that is more; ``norm`` is its norm.

    Rounding moves eigenvalues of S by about ``e ||S||_F``, up or down. A smaller c would leave
    ``K^T (a S + c I) K`` indefinite, and K would grow without end.
    """
    return (a * norm * (8 * torch.finfo(norm.dtype).eps)).clamp(min=c)


def total_curvature(
    H: StructuredMatrix, Q: StructuredMatrix, a: float | Tensor, c: float | Tensor
) -> StructuredMatrix:
    """``X = a H + c Q``, in the memory of ``H``."""
    return _weighted_sum_(a, H, c, Q)


def lerp_weights(
    lr_cov: float, X: Sequence[StructuredMatrix], on_left: Sequence[bool], bound: float | None
) -> list[Any]:
    """``-beta_1 / 2`` for each, where ``beta_1`` is :func:`clipped` for ``m = 1/2 (X - I)``.

    Of an X on the left the norm is that of what it is similar to, which is symmetric.
    """
    if bound is None:
        return [-0.5 * lr_cov] * len(X)

    def weights(trace: Tensor, norm: Tensor, n: Tensor) -> Tensor:
        t = trace / n
        of_mean = t.abs() * n.sqrt()
        # ||X - t I||_F = (||X||_F^2 - ||t I||_F^2)^(1/2), and that without an overflow:
        spread = (norm - of_mean).clamp_(min=0.0).sqrt_() * (norm + of_mean).sqrt_()
        bounds = spread.add_(t.sub_(1.0).abs_()).mul_(0.5 * lr_cov)
        return bounds.clamp_(min=bound).reciprocal_().mul_(-0.5 * lr_cov * bound)

    norms = [
        x.trace_product(x).clamp(min=0.0).sqrt() if left else x.frobenius_norm()
        for x, left in zip(X, on_left, strict=True)
    ]
    return jointly(weights, [x.n for x in X], [x.trace() for x in X], norms)


def lerp_step(
    K: StructuredMatrix, KX: StructuredMatrix, weight: float | Tensor
) -> StructuredMatrix:
    """``K - beta_1 / 2 (K X - K) = K (I - beta_1 m_K)``, in the memory of ``K X`` (or ``X K``).

    That may be wider than ``K``.
    """

    def step_(kx: Tensor, k: Tensor) -> Tensor:
        w = leading(weight, kx) if isinstance(weight, Tensor) else weight
        if k.dtype == kx.dtype:
            return torch.lerp(k, kx, w, out=kx)
        return kx.sub_(k).mul_(w).add_(k)

    return KX.map(step_, K)


def product_residual(P: StructuredMatrix, V: StructuredMatrix, damping: float) -> Tensor:
    """:func:`residual` from ``V = P S``: ``V + lambda P - I`` is similar to what it measures."""
    W = (V + damping * P).add_scaled_identity(-1.0)
    return W.trace_product(W).clamp(min=0.0).sqrt()


def _weighted_sum_(
    a: float | Tensor, X: StructuredMatrix, b: float | Tensor, Y: StructuredMatrix
) -> StructuredMatrix:
    """``a X + b Y`` in the memory of X: fresh memory takes longer than the sum."""

    def sum_(x: Tensor, y: Tensor) -> Tensor:
        if isinstance(a, Tensor) or a != 1:
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
    return Kronecker(CC, _for_rows(KK)).apply_matrix(G)


def precondition_apart(KK: Operator, CC: Operator, G: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The same for ``[G g]``, a weight and its bias ``g [..., d_out, 1]``, without joining them."""
    return Kronecker(CC, _for_rows(KK)).apply_apart(G, g)


def _for_rows(KK: Operator) -> Operator:
    """A symmetric factor, stored so that rows are multiplied by it fast."""
    return KK.mT if isinstance(KK, Dense) else KK  # a product with its transpose, then, is plain


def inner(X: Tensor, Y: Tensor) -> Tensor:
    """Numbers ``[k]`` that add up to ``sum_ij X_ij Y_ij`` over all dimensions, in float32 at least.

    On a GPU in one pass over 16-bit numbers: :mod:`singd.kernels`.
    """
    x, y = X.flatten(), Y.flatten()
    if x.dtype.itemsize >= 4:
        return torch.dot(x, y).view(1)
    if x.is_cuda and (fast := kernels()) is not None:
        sums: Tensor = fast.inner(x, y)
        return sums
    size = _PIECE if x.is_cpu else max(1, len(x))
    pieces = zip(x.split(size), y.split(size), strict=True)
    return torch.stack([torch.dot(one.float(), other.float()) for one, other in pieces])


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
