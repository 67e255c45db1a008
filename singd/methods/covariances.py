"""Averages of the whole curvature of a weight, and what they give before there are factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

from singd.capture.statistics import Statistic
from singd.methods.base import Factors
from singd.methods.structure_choice import DAMPING
from structured import Diagonal, ScaledIdentity, StructuredMatrix


@dataclass(frozen=True)
class Covariances(Factors):
    """Means of ``S_K`` and ``S_C``, in float32 at least, over ``count`` batches (a 1 x 1 member).

    A batch without inputs or without output gradients has no curvature, and does not count.
    """

    S_K: StructuredMatrix
    S_C: StructuredMatrix
    count: ScaledIdentity

    def with_batch(self, new_K: StructuredMatrix, new_C: StructuredMatrix) -> Covariances:
        """The means with one batch more."""
        seen = (new_K.trace() > 0) & (new_C.trace() > 0)
        count = self.count.c + seen
        w = seen / count.clamp(min=1)
        S_K, S_C = ((1 - w) * S + w * new for S, new in ((self.S_K, new_K), (self.S_C, new_C)))
        return Covariances(S_K, S_C, ScaledIdentity(count, 1))

    def batches(self) -> int:
        """How many batches were averaged; the most of any part of a packed weight."""
        return int(self.count.c.max())


Member = TypeVar("Member", bound=StructuredMatrix)


def averaged(S: Member, new: Member, weight: float) -> Member:
    """The mean with one more term; the first that is not zero counts whole."""
    trace = S.trace()
    w = torch.where(trace == 0, torch.ones_like(trace), weight)
    return (1 - w) * S + w * new


def inverse_diagonal(S: StructuredMatrix) -> Diagonal:
    """The inverse of the damped diagonal of ``S``, in units of its mean; the identity of zero."""
    d = S.diagonal()
    mean = d.mean(-1, keepdim=True)
    scaled = torch.where(mean == 0, torch.ones_like(d), d / mean)
    return Diagonal((scaled + DAMPING).reciprocal())


def projected(K: StructuredMatrix, S: StructuredMatrix) -> Statistic:
    """``Pi(K^T S K)`` of an identity ``K``, in a batch of one."""
    wide = torch.promote_types(K.dtype, torch.float32)
    M, trace = S.to_dense()[None].to(wide), S.trace()[None].to(wide)
    return Statistic(K.to(wide).project(M), "whitened", trace)
