"""The updates of many layers at once: the fused form of :mod:`singd.update`, its reference.

Without a momentum the step of a factor is, with ``m = 1/2 (X - I)``,

    K (I - beta_1 m) = K - beta_1/2 (K X - K),     X = a H + c Q,    H = Pi(K^T S K), Q = Pi(K^T K)

with ``a = 1`` and ``c = lambda`` in IKFAC, ``a = mean(H_C)`` and ``c = lambda mean(C^T C)`` in
SINGD. It is fused in three ways.

*Numbers.* ``a``, ``c`` and the bound of ``beta_1`` are one number for each layer. They are worked
out for all layers at once, as vectors: layer by layer a number costs as much as a small product.

*The left form.* For structures closed under transposition let ``P = K K^T``, which is cached for
the steps between two updates. As ``K (K^T S K) = (P S) K`` and ``K (K^T K) = P K``,

    K X = X' K,     X' = a P S + c P

So the step needs one product of size n less than ``K^T S K`` does, and none for ``P S = (P A) A^T``
of few rows ``A^T``. ``X'`` is similar to ``X``, so
``tr X' = tr X`` and ``tr X'^2 = ||X||_F^2``: the numbers are the same.

*Memory.* Terms are summed in place, and large matrices are made when they are needed and freed at
once, so that wide copies of all factors are never there together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from singd import update
from singd.capture.statistics import Statistic
from singd.methods.base import Stack
from singd.ops.parts import Part, completed
from singd.ops.precision import product_dtype
from singd.ops.reductions import jointly, leading
from structured import Dense, Diagonal, StructuredMatrix


@dataclass(frozen=True)
class Rule:
    """The options of a step.

    Attributes:
        kfac_like: IKFAC, otherwise SINGD.
        damping: Damping lambda.
        is_relative: Whether it is in units of ``mean(S_K) mean(S_C)``, or of ``mean(S)`` in IKFAC.
        lr_cov: Step size beta_1.
        factor_clip: Bound of ``||beta_1 m||_2``, or ``None``.
    """

    kfac_like: bool
    damping: Any
    is_relative: bool
    lr_cov: float
    factor_clip: float | None


@dataclass
class _Side:
    """A factor that is due."""

    load: Callable[[], StructuredMatrix]  # K, wide; or as it is stored, if dense
    H: StructuredMatrix  # Pi(K^T S K), or P S in the left form; then X
    dtype: torch.dtype  # of products
    Q: StructuredMatrix | None = None  # Pi(K^T K), or P in the left form
    norm: Tensor | None = None  # of S, where that was summed
    is_left: bool = False
    mean: Tensor | None = None  # mean(S), for a relative damping
    part: Part | None = None  # what of the factor this rank has

    @property
    def size(self) -> int:
        """Of the whole factor."""
        return self.H.n if self.part is None else self.part.n

    def counted(self, M: StructuredMatrix) -> StructuredMatrix:
        """What this rank counts of a member."""
        return M if self.part is None else self.part.counted(M)

    @property
    def K(self) -> StructuredMatrix:
        """The factor, which may be made anew each time."""
        return self.load()

    def gram(self) -> StructuredMatrix:
        """``Q``."""
        return self.K.to(self.dtype).gram().to(self.H.dtype) if self.Q is None else self.Q

    def gram_trace(self) -> Tensor:
        """``tr(Q) = ||K||_F^2``; of a large matrix ``Q`` is not kept for it."""
        if self.Q is None and isinstance(K := self.K, Dense):
            return K.to(self.H.dtype).frobenius_norm().square()
        self.Q = self.gram()
        return self.counted(self.Q).trace()


def steps(
    stacks: Iterable[Stack], rule: Rule
) -> Iterator[tuple[StructuredMatrix, StructuredMatrix]]:
    """The new K and C of every stack of one group, which may be wider.

    A stack holds its statistics until it is taken.
    """
    sides = [side for stack in stacks for side in _sides(stack, rule)]
    weights = _weights(sides, rule)
    for side, (a, c) in zip(sides, weights, strict=True):
        c = c if side.norm is None else update.resolve_damping(c, a, side.norm)
        side.H, side.Q = _weighted_sum_(a, side.H, c, side.gram()), None
    lerps = _lerp_weights(sides, rule)
    while sides:  # nothing is kept longer than its step takes
        K, C = (_moved(sides.pop(0), lerps.pop(0)) for _ in range(2))
        yield K, C


def _sides(stack: Stack, rule: Rule) -> Iterator[_Side]:
    """K and C of a stack, which gives up its statistics."""
    for name, U in (("K", stack.statistics.input), ("C", stack.statistics.grad)):
        side = _side(stack.member(name), U, stack.products.get(2 * name))
        side.mean, side.part = U.mean() if rule.is_relative else None, U.part
        yield side
    stack.statistics = None


def _side(load: Callable[[], StructuredMatrix], U: Statistic, P: StructuredMatrix | None) -> _Side:
    """A factor, what makes its curvature, and on which side of it that stands."""
    if U.columns is not None:
        return _side_of_few(load, U.columns, P)
    K = load()
    wide = torch.promote_types(K.dtype, U.value.dtype)
    S = U.value.to(wide)
    stored = load if K.dtype == wide or isinstance(K, Dense) else _giving(K.to(wide))
    if U.kind == "whitened":
        return _Side(stored, S, product_dtype(K))
    is_diagonal = isinstance(K, Diagonal)  # multiplies number by number: loses no digits
    norm = None if is_diagonal else (S if U.part is None else U.part.counted(S)).frobenius_norm()
    if P is None or not K.closed_under_transpose:
        return _Side(stored, update.curvature(K.to(wide), S), wide, norm=norm)
    P = P if P.dtype == wide else K.to(wide).mT.gram()
    return _Side(stored, P.matmul(S), wide, P, norm, is_left=not is_diagonal)


def _side_of_few(
    load: Callable[[], StructuredMatrix], X: Tensor, P: StructuredMatrix | None
) -> _Side:
    """The same of ``S = X X^T`` with fewer columns than rows: ``P S = (P X) X^T``."""
    K = load()
    wide = torch.promote_types(K.dtype, X.dtype)
    X = X.to(wide)
    norm = torch.linalg.matrix_norm(X.mT @ X)  # that of X X^T
    if P is None:
        return _Side(load, update.whitened(K.to(wide), X), wide, norm=norm)
    P = P if P.dtype == wide else K.to(wide).mT.gram()
    return _Side(load, Dense(P.apply(X) @ X.mT), wide, P, norm, is_left=True)


def _giving(K: StructuredMatrix) -> Callable[[], StructuredMatrix]:
    return lambda: K


def _weights(sides: Sequence[_Side], rule: Rule) -> list[tuple[Any, Any]]:
    """``(a, c)`` of K, C, K, C, ...: for a K of SINGD ``mean(H_C)`` and ``lambda mean(C^T C)``."""
    sizes = [side.size for side in sides]
    means = [side.mean for side in sides if side.mean is not None]
    if rule.kfac_like:
        _complete_norms(sides, [])
        return [(1.0, rule.damping * mean) for mean in means] or [(1.0, rule.damping)] * len(sides)
    curvatures = [side.counted(side.H).trace() for side in sides]
    grams = [side.gram_trace() for side in sides]
    _complete_norms(sides, [curvatures, grams])
    a = jointly(lambda h, n: h / n, sizes, curvatures)
    c = jointly(lambda q, n: q * (rule.damping / n), sizes, grams)
    if means:
        both = [mean * means[i ^ 1].to(mean) for i, mean in enumerate(means)]
        c = jointly(lambda q, s, _: q * s, sizes, c, [both[i ^ 1] for i in range(len(both))])
    return [(a[i ^ 1].to(s.H.dtype), c[i ^ 1].to(s.H.dtype)) for i, s in enumerate(sides)]


def _complete_norms(sides: Sequence[_Side], sums: Sequence[list[Tensor]]) -> None:
    """Complete norms of S, and other sums, of sides of which this rank has a part, in place."""
    shared = [i for i, side in enumerate(sides) if side.part is not None]
    if not shared:
        return
    with_norms = [i for i in shared if sides[i].norm is not None]
    numbers = [each[i] for each in sums for i in shared]
    numbers += [norm.square() for i in with_norms if (norm := sides[i].norm) is not None]
    owners = [sides[i].part for i in [*shared * len(sums), *with_norms]]
    found = iter(completed(numbers, owners))
    for each in sums:
        for i in shared:
            each[i] = next(found)
    for i in with_norms:
        sides[i].norm = next(found).sqrt()


def _lerp_weights(sides: Sequence[_Side], rule: Rule) -> list[Any]:
    """``-beta_1 / 2`` for each, where ``beta_1`` is :func:`singd.update.clip_lr_cov`.

    Zero where S is nothing that damping could be relative to.
    """
    lr_cov, measured = rule.lr_cov, _measured(sides, rule.kfac_like)
    if rule.factor_clip is None:
        weight = -0.5 * lr_cov
        return [weight * each for each in measured] if measured else [weight] * len(sides)
    bound = rule.factor_clip

    def weights(trace: Tensor, norm: Tensor, *others: Tensor) -> Tensor:
        *moves, n = others
        t = trace / n
        of_mean = t.abs() * n.sqrt()
        # ||X - t I||_F = (||X||_F^2 - ||t I||_F^2)^(1/2), and that without an overflow:
        spread = (norm - of_mean).clamp_(min=0.0).sqrt_() * (norm + of_mean).sqrt_()
        norms = spread.add_(t.sub_(1.0).abs_()).mul_(0.5 * lr_cov)
        found = norms.clamp_(min=bound).reciprocal_().mul_(-0.5 * lr_cov * bound)
        return found.mul_(moves[0]) if moves else found

    X = [side.counted(side.H) for side in sides]
    traces = [x.trace() for x in X]
    norms = [
        x.trace_product(x).clamp(min=0.0).sqrt() if side.is_left else x.frobenius_norm()
        for x, side in zip(X, sides, strict=True)
    ]
    shared = [i for i, side in enumerate(sides) if side.part is not None]
    if shared:
        numbers = [traces[i] for i in shared] + [norms[i].square() for i in shared]
        found = completed(numbers, [sides[i].part for i in shared] * 2)
        for i, trace, square in zip(shared, found, found[len(shared) :], strict=False):
            traces[i], norms[i] = trace, square.sqrt()
    more = [measured] if measured else []
    return jointly(weights, [side.size for side in sides], traces, norms, *more)


def _measured(sides: Sequence[_Side], kfac_like: bool) -> list[Tensor]:
    """1 where a factor can follow S and 0 where not, as damping is relative to it; else nothing."""
    means = [side.mean for side in sides if side.mean is not None]
    if not means:
        return []
    others = means if kfac_like else [means[i ^ 1].to(mean) for i, mean in enumerate(means)]
    return jointly(
        lambda mean, other, _: (update.is_measured(mean) & update.is_measured(other)).to(mean),
        [side.size for side in sides],
        means,
        others,
    )


def _moved(side: _Side, weight: float | Tensor) -> StructuredMatrix:
    """``K - beta_1/2 (K X - K)``, in the memory of ``K X`` (or ``X' K``), which may be wider."""
    stored, X, wide = side.K, side.H.to(side.dtype), side.H.dtype
    K = stored.to(side.dtype)
    KX = (X.matmul(K) if side.is_left else K.matmul(X)).to(wide)
    del X

    def lerp_(kx: Tensor, k: Tensor) -> Tensor:
        w = leading(weight, kx) if isinstance(weight, Tensor) else weight
        if k.dtype == kx.dtype:
            return torch.lerp(k, kx, w, out=kx)
        return kx.sub_(k).mul_(w).add_(k)

    return KX.map(lerp_, stored)


def _weighted_sum_(
    a: float | Tensor, X: StructuredMatrix, b: float | Tensor, Y: StructuredMatrix
) -> StructuredMatrix:
    """``a X + b Y`` in the memory of X: fresh memory takes longer than the sum."""

    def sum_(x: Tensor, y: Tensor) -> Tensor:
        if isinstance(a, Tensor) or a != 1:
            x.mul_(leading(a, x) if isinstance(a, Tensor) else a)
        return x.addcmul_(y, leading(b, y)) if isinstance(b, Tensor) else x.add_(y, alpha=b)

    return X.map(sum_, Y)
