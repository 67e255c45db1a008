"""KFAC: the baseline, with a float32 Cholesky inverse of every Kronecker factor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from singd import update
from singd.capture.statistics import Columns, Side, Statistic
from singd.methods.base import Averages, Factors, Method, Options, Products
from singd.methods.directions import precondition_by_products
from singd.methods.options import in_range, wide
from structured import Dense, Structure, StructuredMatrix


@dataclass(frozen=True)
class KFACFactors(Factors):
    """Moving averages of ``S_K`` and ``S_C``, and the inverses of both with damping."""

    S_K: StructuredMatrix
    S_C: StructuredMatrix
    inverse_K: StructuredMatrix
    inverse_C: StructuredMatrix


class KroneckerFactored(Method):
    """KFAC (Martens & Grosse, arXiv 1503.05671): averages of the factors, and their inverses."""

    is_split = True

    def check(self, options: Options) -> None:
        """Raise ``ValueError`` if an option is out of range."""
        in_range("lr_cov", options["lr_cov"], 0.0, 1.0)

    def init(
        self, shape: Sequence[int], structures: Sequence[Structure], options: Options, **like: Any
    ) -> KFACFactors:
        """Identities, in float32 at least."""
        *inner, d_out, d_in = shape
        like = wide(like, inner)
        return KFACFactors(*(Dense.identity(n, **like) for n in (d_in, d_out, d_in, d_out)))

    def summarize(
        self, factors: KFACFactors, side: Side, columns: Columns, options: Options
    ) -> Statistic:
        """``S``."""
        S = factors.S_K if side == "input" else factors.S_C
        return Statistic(S.project_gram(columns.tensor().to(S.dtype)))

    def needs_factors(self, factors: KFACFactors, options: Options) -> bool:
        """Covariances need none."""
        return False

    def update(
        self, factors: KFACFactors, statistics: Averages, options: Options, step: int
    ) -> KFACFactors:
        """New averages, and their inverses."""
        lr_cov, damping = options["lr_cov"], options["damping"]
        S_K = update.kfac_average(factors.S_K, statistics.input.value, lr_cov)
        S_C = update.kfac_average(factors.S_C, statistics.grad.value, lr_cov)
        inverses = (update.kfac_inverse(S.to_dense(), damping) for S in (S_K, S_C))
        return KFACFactors(S_K, S_C, *(Dense(inverse) for inverse in inverses))

    def roots(self, factors: KFACFactors) -> tuple[StructuredMatrix, StructuredMatrix]:
        """Cholesky factors of the inverses."""
        inverses = factors.inverse_K, factors.inverse_C
        K, C = (Dense(torch.linalg.cholesky(inverse.to_dense())) for inverse in inverses)
        return K, C

    def precondition(self, factors: KFACFactors, G: Tensor, products: Products) -> Tensor:
        """``(S_C + lambda I)^-1 G (S_K + lambda I)^-1``."""
        K, C = factors.inverse_K, factors.inverse_C
        return precondition_by_products(K, C, G.to(K.dtype)).to(G.dtype)

    def apply_input(self, factors: KFACFactors, G: Tensor, products: Products) -> Tensor:
        """``G (S_K + lambda I)^-1``."""
        K = factors.inverse_K
        return K.apply(G.to(K.dtype).mT).mT

    def apply_grad(self, factors: KFACFactors, G: Tensor, products: Products) -> Tensor:
        """``(S_C + lambda I)^-1 G``."""
        return factors.inverse_C.apply(G.to(factors.inverse_C.dtype))
