"""Averages of the whole curvature of a weight, and what they give before there are factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from singd.capture.statistics import Columns, Side, Statistic
from singd.methods.base import Factors
from singd.methods.options import wide
from singd.methods.structure_choice import DAMPING
from singd.update import is_measured
from structured import Diagonal, ScaledIdentity, Structure, StructuredMatrix


@dataclass(frozen=True)
class Covariances(Factors):
    """Means of ``S_K`` and ``S_C``, in float32 at least: whole, or ``Pi(S)`` where that will do."""

    S_K: StructuredMatrix
    S_C: StructuredMatrix

    @classmethod
    def zeros(
        cls, shape: Sequence[int], structures: Sequence[Structure], **like: Any
    ) -> Covariances:
        """The means of nothing; arguments are those of :meth:`singd.Method.init`."""
        *inner, d_out, d_in = shape
        like = wide(like, inner)
        S_K, S_C = (s(n, **like) for s, n in zip(structures, (d_in, d_out), strict=True))
        return Covariances(S_K, S_C)

    def summarize(self, side: Side, columns: Columns) -> Statistic:
        """``Pi(S)`` of a batch."""
        S = self.S_K if side == "input" else self.S_C
        if isinstance(S, Diagonal):
            return Statistic(Diagonal(columns.squares()))
        return Statistic(S.project_gram(columns.tensor().to(S.dtype)))


@dataclass(frozen=True)
class CountedCovariances(Covariances):
    """Means over ``count`` batches (a 1 x 1 member), and of the ``rows`` of inputs on each rank.

    A batch without inputs or without output gradients has no curvature, and does not count.
    """

    count: ScaledIdentity
    rows: ScaledIdentity

    @classmethod
    def zeros(
        cls, shape: Sequence[int], structures: Sequence[Structure], **like: Any
    ) -> CountedCovariances:
        """The means of nothing, of no batch."""
        S = Covariances.zeros(shape, structures, **like)
        numbers = (ScaledIdentity.zeros(1, **wide(like, shape[:-2])) for _ in range(2))
        return CountedCovariances(S.S_K, S.S_C, *numbers)

    def with_batch(
        self, new_K: StructuredMatrix, new_C: StructuredMatrix, rows: Sequence[float]
    ) -> CountedCovariances:
        """The means with one batch more."""
        seen = (new_K.trace() > 0) & (new_C.trace() > 0)
        count = self.count.c + seen
        w = seen / count.clamp(min=1)
        S_K, S_C = ((1 - w) * S + w * new for S, new in ((self.S_K, new_K), (self.S_C, new_C)))
        new_rows = count.new_tensor(rows or 0.0).view(-1, *[1] * (count.ndim - 1))
        mean_rows = torch.lerp(self.rows.c, new_rows, w)
        return CountedCovariances(S_K, S_C, *(ScaledIdentity(c, 1) for c in (count, mean_rows)))

    def batches(self) -> int:
        """How many batches were averaged; the most of any part of a packed weight."""
        return int(self.count.c.max())

    def mean_rows(self) -> float:
        """Rows of a batch; those of the part of a packed weight that has the most."""
        return float(self.rows.c.max())


Member = TypeVar("Member", bound=StructuredMatrix)


def averaged(S: Member, new: Member, weight: float) -> Member:
    """The mean with one more term; the first that is not zero counts whole."""
    trace = S.trace()
    w = torch.where(trace == 0, torch.ones_like(trace), weight)
    return (1 - w) * S + w * new


def inverse_diagonal(S: StructuredMatrix) -> Diagonal:
    """The inverse of the damped diagonal of ``S``; the identity where S is nothing.

    In the units of ``K K^T``: lengths of directions are averaged over steps before and after K.
    """
    d = S.diagonal()
    mean = d.mean(-1, keepdim=True)
    return Diagonal(torch.where(is_measured(mean), d + DAMPING * mean, 1.0).reciprocal())


def projected(K: StructuredMatrix, S: StructuredMatrix) -> Statistic:
    """``Pi(K^T S K)`` of an identity ``K``, in a batch of one."""
    wide = torch.promote_types(K.dtype, torch.float32)
    M, trace = S.to_dense()[None].to(wide), S.trace()[None].to(wide)
    return Statistic(K.to(wide).project(M), "whitened", trace)
