"""A second moment in a tracked basis, as SOAP has it: Adam where the curvature is nearly diagonal.

For a gradient ``G [d_1, ..., d_k]`` with the unfolding ``G_i [d_i, d / d_i]`` in mode i, the basis
of a mode is tracked by one orthogonal iteration for the average of ``G_i G_i^T`` (Vyas et al.,
arXiv 2409.11321, Algorithms 3 and 4)::

    S_i <- beta S_i + (1 - beta) G_i G_i^T
    Q_i <- the orthogonal factor of (S_i + lambda mean(S_i) I) Q_i

and the preconditioner is diagonal in the basis ``Q_1 x ... x Q_k``, ``V^(-1/2)`` there::

    V <- beta V + (1 - beta) (G x_1 Q_1^T ... x_k Q_k^T)^2
    D  = (G x_1 Q_1^T ... / (V + lambda mean(V))^(1/2)) x_1 Q_1 ... x_k Q_k

Here ``V`` follows its basis, unlike in SOAP: it becomes what is nearest to it in the new one, with
``R_i = Q_i^T (old Q_i)`` the product with the squares of the entries of ``R_i`` in every mode. That
is :meth:`structured.Rotated.rebase` of a diagonal matrix under a Kronecker product. A basis that
turns by a half then does not meet the moments of other directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from singd.methods.base import Factors, Method, Options, Products
from singd.methods.covariances import averaged
from singd.methods.options import in_range, integer, wide
from structured import Dense, Diagonal, Structure, StructuredMatrix, parse


@dataclass(frozen=True)
class MovingMoments(Factors):
    """Averages ``S_i`` and bases ``Q_i`` of all modes, and the second moments ``V`` in the bases.

    A wide mode has scaled identities for both.
    """

    S: tuple[StructuredMatrix, ...]
    Q: tuple[StructuredMatrix, ...]
    V: Diagonal


class TrackedBasis(Method):
    """Second moments of gradients in the basis of their covariance."""

    needs_activations = False
    identity = ("max_dim",)

    def check(self, options: Options) -> None:
        """Raise ``ValueError`` if an option is out of range."""
        in_range("beta2", options["beta2"], 0.0, 1.0, open_end=True)
        integer("basis_interval", options["basis_interval"], 1)
        integer("max_dim", options["max_dim"], 0)

    def structures(
        self, name: str, shape: Sequence[int], input_structure: str | None, options: Options
    ) -> tuple[Structure, ...]:
        """Dense in every mode; no basis beyond ``max_dim``."""
        return tuple(
            parse("dense" if n <= options["max_dim"] else "scaled_identity") for n in shape
        )

    def init(
        self, shape: Sequence[int], structures: Sequence[Structure], options: Options, **like: Any
    ) -> MovingMoments:
        """No moments, and the basis of the parameter, in float32 at least."""
        like = wide(like)
        S = tuple(s(n, **like) for s, n in zip(structures, shape, strict=True))
        Q = tuple(zero.add_scaled_identity(1.0) for zero in S)
        return MovingMoments(S, Q, Diagonal.zeros(math.prod(shape), **like))

    def update(
        self, factors: MovingMoments, statistics: Tensor, options: Options, step: int
    ) -> MovingMoments:
        """Averages, bases if it is their turn (or one of the first steps), then moments."""
        G, beta, every = statistics.to(factors.V.dtype), options["beta2"], options["basis_interval"]
        S, Q, V = list(factors.S), list(factors.Q), factors.V.d.view(G.shape)
        turns = step < every or step % every == 0
        for i, (X, n) in enumerate(zip(unfoldings(G), G.shape[1:], strict=True)):
            S[i] = averaged(S[i], S[i].project_gram(X) * (n / G[0].numel()), 1 - beta)
            if turns and isinstance(S[i], Dense):
                before, Q[i] = Q[i], iterated(S[i], Q[i], options["damping"])
                V = in_mode(i, before.mT.matmul(Q[i]).mT.to_dense().square().matmul, V)
        square = in_bases(Q, G).square()
        new = averaged(Diagonal(V.flatten(1)), Diagonal(square.flatten(1)), 1 - beta)
        return MovingMoments(tuple(S), tuple(Q), new)

    def typical_steps(self, options: Options) -> Mapping[int, float]:
        """One step that turns the bases, and one that does not."""
        every = options["basis_interval"]
        turning = math.gcd(options["T"], every) / every
        return {every: turning, every + 1: 1.0 - turning}

    def products(self, factors: MovingMoments, options: Options) -> Products:
        """The reciprocal roots of the moments."""
        V = factors.V.d
        added = options["damping"] * V.mean(-1, keepdim=True) + torch.finfo(V.dtype).tiny
        return {"root": Diagonal((V + added).rsqrt())}

    def precondition(self, factors: MovingMoments, G: Tensor, products: Products) -> Tensor:
        """The gradient in the bases, divided by the roots, and back."""
        turned = in_bases(factors.Q, G.to(factors.V.dtype))
        D = turned * products["root"].d.view(turned.shape)
        return in_bases([Q.mT for Q in factors.Q], D).to(G.dtype)


def in_mode(i: int, function: Callable[[Tensor], Tensor], G: Tensor) -> Tensor:
    """``function`` of the unfolding ``[b, d_i, d / d_i]`` of ``G [b, d_1, ..., d_k]`` in mode i.

    It may change ``d_i``.
    """
    X = G.movedim(i + 1, 1)
    return function(X.flatten(2)).unflatten(2, X.shape[2:]).movedim(1, i + 1)


def unfoldings(G: Tensor) -> list[Tensor]:
    """``[b, d_i, d / d_i]`` for every mode of ``G [b, d_1, ..., d_k]``."""
    return [G.movedim(i, 1).flatten(2) for i in range(1, G.ndim)]


def in_bases(Q: Sequence[StructuredMatrix], G: Tensor) -> Tensor:
    """``G x_1 Q_1^T ... x_k Q_k^T``."""
    for i, Q_i in enumerate(Q):
        if isinstance(Q_i, Dense):
            G = in_mode(i, Q_i.apply_transpose, G)
    return G


def iterated(S: StructuredMatrix, Q: StructuredMatrix, damping: float) -> Dense:
    """One orthogonal iteration; where ``S`` is nothing the basis stays.

    Signs are those that turn the basis least.
    """
    mean = S.trace() / S.n
    added = damping * mean + torch.finfo(S.dtype).tiny
    turned, R = torch.linalg.qr(S.add_scaled_identity(added).apply(Q.to_dense()))
    sign = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(turned.dtype)
    return Dense(turned * sign[..., None, :])
