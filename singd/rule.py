"""One update of all factors that are due: which formulas of :mod:`singd.update`, in what order.

Terms are summed in place and large matrices made late and freed early, so that the wide copies of
all factors are never there at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from singd import update
from singd.capture import Form
from singd.factors import Job
from singd.grouping import Members
from singd.options import Group
from singd.precision import products_in, rounds_products
from structured import Dense, Diagonal, StructuredMatrix, add_symmetric_product_


def updated(group: Group, jobs: Iterable[Job]) -> Iterator[Members]:
    """New factors, and momenta of them, job by job.

    Args:
        group: Of the parameters.
        jobs: All that are due in the group; each holds sums until it is taken.
    """
    factors = [_factor(group, job, side) for job in jobs for side in job.forms]
    weights: Sequence[tuple[Any, Any]] = [(1.0, group["damping"])] * len(factors)
    if not group["kfac_like"]:
        H, traces = [f.H for f in factors], [f.gram_trace() for f in factors]
        weights = update.singd_weights(H, traces, group["damping"])
        del H
    for f, (a, c) in zip(factors, weights, strict=True):
        c = c if f.norm is None else update.resolved_damping(c, a, f.norm)
        f.H, f.Q = update.total_curvature(f.H, f.gram(), a, c), None
    steps: list[Any] = [None] * len(factors)
    if not by_momentum(group):
        X, on_left = [f.H for f in factors], [f.on_left for f in factors]
        steps = update.lerp_weights(lr_cov(group), X, on_left, group["factor_clip"])
        del X
    while factors:  # none is kept longer than its step takes
        yield _move(group, factors.pop(0), steps.pop(0)) | _move(
            group, factors.pop(0), steps.pop(0)
        )


def by_momentum(group: Group) -> bool:
    """Whether an update needs the momentum ``m_K`` itself."""
    return bool(group["normalize_lr_cov"] or (group["alpha1"] and not group["kfac_like"]))


def by_products(group: Group) -> bool:
    """Whether an update may go by the products ``K K^T`` that are kept."""
    return group["keep_products"] and not by_momentum(group)


def lr_cov(group: Group) -> Any:
    """``beta_1`` at this step."""
    return group["lr_cov"](group["step"]) if callable(group["lr_cov"]) else group["lr_cov"]


# Statistics --------------------------------------------------------------------------------------


def form_of(K: StructuredMatrix) -> Form:
    """What to sum for a factor: S, unless that loses too many digits or does not determine H."""
    rounded = rounds_products(_multiplied_in(K), K.device) and not isinstance(K, Diagonal)
    return "H" if rounded or not K.closed_under_congruence else "S"


def statistic(K: StructuredMatrix, X: Tensor, form: Form) -> StructuredMatrix:
    """``Pi(S)`` or ``Pi(K^T S K)`` of the columns ``X [..., n, R]``, in float32 at least."""
    dtype = torch.promote_types(K.dtype, X.dtype)
    dtype = torch.float32 if dtype == torch.float16 else dtype
    wide = torch.promote_types(dtype, torch.float32)
    if form == "H":
        return update.rooted_statistic(K.to(dtype), X.to(dtype)).to(wide)
    if isinstance(K, Dense) and X.dtype == torch.bfloat16:  # exact sums of its products
        S = X.new_empty(*X.shape[:-1], K.n, dtype=wide)
        add_symmetric_product_(S, X, beta=0.0)
        return Dense(S)
    return K.to(wide).project_gram(X.to(wide))


# Steps -------------------------------------------------------------------------------------------


@dataclass
class _Factor:
    """A factor that is due; see :mod:`singd.update`."""

    side: str
    K: StructuredMatrix  # in the precision of the sums as all else, or as it is stored
    m: StructuredMatrix | None  # its momentum
    H: StructuredMatrix
    dtype: torch.dtype  # of its products
    Q: StructuredMatrix | None = None  # ``Pi(K^T K)``, or ``K K^T`` on the left
    norm: Tensor | None = None  # of S, where that was summed
    on_left: bool = False

    def gram(self) -> StructuredMatrix:
        """``Q``."""
        return self.K.to(self.dtype).gram().to(self.H.dtype) if self.Q is None else self.Q

    def gram_trace(self) -> Tensor:
        """``tr(Q)``; of large matrices ``Q`` is not kept for it."""
        if self.Q is None and isinstance(self.K, Dense):
            return update.gram_trace(self.K.to(self.H.dtype))
        self.Q = self.gram()
        return self.Q.trace()


def _factor(group: Group, job: Job, side: str) -> _Factor:
    """A factor, what makes its curvature, and on which side of it that stands."""
    U, form = job.sums.pop(side), job.forms[side]
    kept, norm = job.old[side], None
    wide = torch.promote_types(kept.dtype, U.dtype)
    K, U, m = kept.to(wide), U.to(wide), job.old.get(f"m_{side}")
    held = kept if isinstance(kept, Dense) else K
    if form == "H":
        return _Factor(side, held, m, U, _multiplied_in(kept))
    commutes = isinstance(K, Diagonal)  # and multiplies number by number: it loses no digits
    if form == "S" and not commutes:
        norm = U.frobenius_norm()
    P = job.products.get(2 * side) if by_products(group) else None
    if P is None or not K.closed_under_transpose:
        return _Factor(side, held, m, update.curvature(K, U), wide, norm=norm)
    P = P if P.dtype == wide else K.mT.gram()
    V = U if form == "PS" else P.matmul(U)
    return _Factor(side, held, m, V, wide, P, norm, on_left=not commutes)


def _move(group: Group, factor: _Factor, step: float | Tensor | None) -> Members:
    """The step of one factor, by its weight; or by momentum if there is none."""
    if step is None:
        return _move_by_momentum(group, factor)
    K, X, wide = factor.K.to(factor.dtype), factor.H.to(factor.dtype), factor.H.dtype
    del factor.H
    KX = X.matmul(K) if factor.on_left else K.matmul(X)
    del K, X
    return {factor.side: update.lerp_step(factor.K, KX.to(wide), step)}


def _move_by_momentum(group: Group, factor: _Factor) -> Members:
    """The step of one factor with a momentum, or normalized."""
    new: Members = {}
    alpha1 = 0.0 if factor.m is None else group["alpha1"]
    m_K = 0.5 * factor.H.add_scaled_identity(-1.0)
    if group["normalize_lr_cov"]:
        m_K = (1 - alpha1) * m_K  # else the largest entry could only grow
    if factor.m is not None:
        m_K = new[f"m_{factor.side}"] = alpha1 * factor.m.to(m_K.dtype) + m_K
    beta_1 = lr_cov(group)
    if group["normalize_lr_cov"]:
        beta_1 = update.normalized(beta_1, m_K)
    if group["factor_clip"] is not None:
        beta_1 = update.clipped(beta_1, m_K, group["factor_clip"])
    new[factor.side] = update.factor_step(factor.K.to(m_K.dtype), m_K, beta_1)
    return new


def _multiplied_in(K: StructuredMatrix) -> torch.dtype:
    """The precision of products with K and its curvature: only large ones gain by a low one."""
    dense = products_in(K.dtype, K.device)
    return dense if isinstance(K, Dense) else torch.promote_types(dense, torch.float32)
