"""A second moment in the leading directions of a tracked basis, and one number for all others.

In mode i of a gradient ``G [d_1, ..., d_k]`` only the r leading eigenvectors ``Q_i [d_i, r]`` of
the average of ``G_i G_i^T`` are tracked. All directions at a right angle to them are treated alike:
moments are ``V [r + 1, ..., r + 1]``, the last of each mode a mean over such directions.
The preconditioner is diagonal in the basis of :mod:`singd.methods.soap`, with equal numbers outside
the leading directions: in each mode a ``rotated(direct_sum(diagonal, scaled_identity, r), Q_i)``.

The average itself is not stored, but its spectrum ``L_i [r]`` within the tracked directions. With
``M = beta Q_i L_i Q_i^T + (1 - beta) G_i G_i^T``, one orthogonal iteration and the Rayleigh
quotients are::

    Q_i <- the orthogonal factor of (M + lambda mean(Q_i^T M Q_i) I) Q_i
    L_i <- diag(Q_i^T M Q_i)

(streaming PCA by block power iteration: Mitliagkas et al., "Memory limited, streaming PCA", 2013).
Moments move with their basis, as in SOAP here: ``V`` becomes what is nearest to it in the new one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from singd.methods.base import Factors, Method, Options, Products
from singd.methods.covariances import averaged
from singd.methods.options import in_range, integer, wide
from singd.methods.soap import in_mode, unfoldings
from structured import Diagonal, Structure, StructuredMatrix, parse


class LeadingColumns(StructuredMatrix):
    """``[Q, 0]``: a matrix whose first columns are ``Q [..., n, r]``, to store them."""

    Q: Tensor  # [..., n, r]

    @classmethod
    def zeros(cls, n: int, rank: int, *, batch_shape: Sequence[int] = (), **opts: Any) -> Self:
        """No columns but zeros, ``min(rank, n)`` of them."""
        return cls(torch.zeros(*batch_shape, n, min(rank, n), **opts))

    def to_dense(self) -> Tensor:
        """``[Q, 0]``."""
        return torch.nn.functional.pad(self.Q, (0, self.Q.shape[-2] - self.Q.shape[-1]))


@dataclass(frozen=True)
class SpikedMoments(Factors):
    """Spectra ``L_i`` and leading directions ``Q_i`` of all modes, and moments ``V`` in them."""

    L: tuple[StructuredMatrix, ...]
    Q: tuple[StructuredMatrix, ...]
    V: Diagonal


class SpikedBasis(Method):
    """Second moments of gradients in the leading directions of their covariance."""

    needs_activations = False
    identity = ("rank",)

    def check(self, options: Options) -> None:
        """Raise ``ValueError`` if an option is out of range."""
        in_range("beta2", options["beta2"], 0.0, 1.0, open_end=True)
        integer("rank", options["rank"], 1)

    def structures(
        self, name: str, shape: Sequence[int], input_structure: str | None, options: Options
    ) -> tuple[Structure, ...]:
        """So many columns in every mode."""
        return tuple(parse(f"leading_columns({min(options['rank'], n)})") for n in shape)

    def init(
        self, shape: Sequence[int], structures: Sequence[Structure], options: Options, **like: Any
    ) -> SpikedMoments:
        """No moments, and the first directions of the parameter, in float32 at least."""
        like = wide(like)
        ranks = [min(options["rank"], n) for n in shape]
        L = tuple(Diagonal.zeros(r, **like) for r in ranks)
        Q = tuple(
            s(n, **like).map(_first_directions) for s, n in zip(structures, shape, strict=True)
        )
        return SpikedMoments(L, Q, Diagonal.zeros(math.prod(r + 1 for r in ranks), **like))

    def update(
        self, factors: SpikedMoments, statistics: Tensor, options: Options, step: int
    ) -> SpikedMoments:
        """Spectra and directions, the moments that follow them, then the moments of this batch."""
        G, beta = statistics.to(factors.V.dtype), options["beta2"]
        L, Q, V = list(factors.L), _columns(factors), _array(factors)
        for i, (X, n) in enumerate(zip(unfoldings(G), G.shape[1:], strict=True)):
            X, before = X * (n / G[0].numel()) ** 0.5, Q[i]
            spectrum, Q[i] = turned(L[i].diagonal(), before, X, beta, options["damping"])
            L[i] = Diagonal(spectrum)
            V = in_mode(i, partial(rebased, old=before, new=Q[i]), V)
        square = G
        for i, Q_i in enumerate(Q):
            square = in_mode(i, partial(split, Q=Q_i), square)
        square = square.square()
        for i, Q_i in enumerate(Q):
            square = in_mode(i, partial(pooled, Q=Q_i), square)
        new = averaged(Diagonal(V.flatten(1)), Diagonal(square.flatten(1)), 1 - beta)
        members = (member.with_tensors([Q_i]) for member, Q_i in zip(factors.Q, Q, strict=True))
        return SpikedMoments(tuple(L), tuple(members), new)

    def products(self, factors: SpikedMoments, options: Options) -> Products:
        """The reciprocal roots of the moments, whose mean is that in all directions."""
        V = _array(factors)
        counts = [_counts(Q_i) for Q_i in _columns(factors)]
        mean = V
        for i, count in enumerate(counts):
            mean = in_mode(i, partial(torch.matmul, count / count.sum()), mean)
        added = options["damping"] * mean + torch.finfo(V.dtype).tiny
        return {"root": Diagonal((V + added).rsqrt().flatten(1))}

    def precondition(self, factors: SpikedMoments, G: Tensor, products: Products) -> Tensor:
        """The parts of the gradient, each divided by its root, together."""
        root = products["root"].d.view(_array(factors).shape)
        D = G.to(root.dtype)
        for i, Q_i in enumerate(_columns(factors)):
            D = in_mode(i, partial(split, Q=Q_i), D)
            root = in_mode(i, partial(expanded, Q=Q_i), root)
        D = D * root
        for i, Q_i in enumerate(_columns(factors)):
            D = in_mode(i, partial(joined, Q=Q_i), D)
        return D.to(G.dtype)


def _columns(factors: SpikedMoments) -> list[Tensor]:
    """``Q_i [b, d_i, r_i]``."""
    return [member.tensors()[0] for member in factors.Q]


def _array(factors: SpikedMoments) -> Tensor:
    """``V [b, r_1 + 1, ..., r_k + 1]``."""
    return factors.V.d.view(-1, *(L_i.n + 1 for L_i in factors.L))


def _first_directions(Q: Tensor) -> Tensor:
    return torch.eye(*Q.shape[-2:], dtype=Q.dtype, device=Q.device).expand_as(Q).clone()


# Formulas ----------------------------------------------------------------------------------------


def turned(L: Tensor, Q: Tensor, X: Tensor, beta: float, damping: float) -> tuple[Tensor, Tensor]:
    """The spectrum and directions after one orthogonal iteration with ``X X^T``.

    Args:
        L: Spectrum ``[b, r]``; where it is nothing, ``X X^T`` counts whole.
        Q: Directions ``[b, n, r]``.
        X: Matrices ``[b, n, m]``.
        beta: Averaging rate.
        damping: In units of the mean of ``Q^T M Q``.
    """
    w = torch.where(L.sum(-1, keepdim=True) == 0, 1.0, 1 - beta)
    seen = X.mT @ Q
    mean = ((1 - w) * L + w * seen.square().sum(1)).mean(-1, keepdim=True)
    added = damping * mean + torch.finfo(L.dtype).tiny
    MQ = Q * ((1 - w) * L + added)[:, None] + w[..., None] * (X @ seen)
    new = torch.linalg.qr(MQ).Q
    kept = ((Q.mT @ new).square() * L[..., None]).sum(1)
    return (1 - w) * kept + w * (X.mT @ new).square().sum(1), new


def split(X: Tensor, Q: Tensor) -> Tensor:
    """``[Q^T X; X - Q Q^T X]``: the leading parts ``[b, r, m]``, then the rest ``[b, n, m]``."""
    leading = Q.mT @ X
    return torch.cat([leading, X - Q @ leading], 1)


def joined(Y: Tensor, Q: Tensor) -> Tensor:
    """``X [b, n, m]`` of its parts."""
    r = Q.shape[-1]
    return Q @ Y[:, :r] + Y[:, r:]


def pooled(E: Tensor, Q: Tensor) -> Tensor:
    """Squares of the parts ``[b, r + n, m]`` as moments ``[b, r + 1, m]``, the last their mean."""
    n, r = Q.shape[-2:]
    return torch.cat([E[:, :r], E[:, r:].sum(1, keepdim=True) / max(n - r, 1)], 1)


def expanded(v: Tensor, Q: Tensor) -> Tensor:
    """Numbers ``[b, r + 1, m]``, the last one n times, for each part: ``[b, r + n, m]``."""
    n, r = Q.shape[-2:]
    return torch.cat([v[:, :r], v[:, r:].expand(-1, n, -1)], 1)


def rebased(v: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Moments ``[b, r + 1, m]`` as what is nearest to them in other directions."""
    n, r = old.shape[-2:]
    R = (new.mT @ old).square()
    outside, lost = ((1 - R.sum(dim)).clamp(min=0.0) for dim in (2, 1))
    leading = R @ v[:, :r] + outside[..., None] * v[:, r:]
    kept = (n - r - lost.sum(1)).clamp(min=0.0)[:, None, None]
    rest = lost[:, None] @ v[:, :r] + kept * v[:, r:]
    return torch.cat([leading, rest / max(n - r, 1)], 1)


def _counts(Q: Tensor) -> Tensor:
    """How many directions each of the moments is of: one, or the rest ``[1, r + 1]``."""
    n, r = Q.shape[-2:]
    return torch.cat([Q.new_ones(1, r), Q.new_full((1, 1), float(n - r))], 1)
