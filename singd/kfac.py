"""KFAC: the baseline, with a float32 Cholesky inverse of every Kronecker factor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from singd import update
from singd.base import KroneckerOptimizer
from singd.capture import Unit
from singd.factors import Job
from singd.grouping import Members, Products
from singd.options import Group, in_range
from structured import Dense, StructuredMatrix


class KFAC(KroneckerOptimizer):
    """Kronecker-factored approximate curvature (Martens & Grosse, arXiv 1503.05671).

    Keeps moving averages of ``S_K`` and ``S_C`` and inverts ``S + damping I`` whenever they change,
    in float32 at least; a step whose damped factors are not positive definite is skipped, as one
    that is not finite. Shares layers, statistics and the bound of the step with
    :class:`singd.SINGD`; the arguments are its, where they apply. ``lr_cov`` is the weight of new
    statistics in the moving averages, which start from the identity.

    Raises:
        ValueError: If an option is out of range.
    """

    _sides = ("S_K", "S_C")

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        lr: float = 0.1,
        momentum: float = 0.9,
        damping: float = 0.001,
        weight_decay: float = 0.0,
        T: int = 10,
        loss_average: str | None = "batch",
        lr_cov: float = 0.3,
        kfac_approx: str = "expand",
        kl_clip: float | None = 3e-5,
        graft: str | None = None,
        adamw: Mapping[str, Any] | None = None,
        seed: int = 0,
        max_skipped: int | None = 10,
        telemetry: Callable[[dict[str, Any]], None] | None = None,
        process_group: Any = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "damping": damping,
            "weight_decay": weight_decay,
            "T": T,
            "loss_average": loss_average,
            "lr_cov": lr_cov,
            "kfac_approx": kfac_approx,
            "kl_clip": kl_clip,
            "graft": graft,
            "seed": seed,
        }
        super().__init__(model, params, defaults, adamw, (), max_skipped, telemetry, process_group)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        in_range("lr_cov", group["lr_cov"], 0.0, 1.0)

    def _fresh(self, unit: Unit, batch: tuple[int, ...], device: torch.device | str) -> Members:
        *inner, d_out, d_in = unit.shape
        wide = torch.promote_types(unit.weight.dtype, torch.float32)
        members: Members = {}
        for side, n in (("K", d_in), ("C", d_out)):
            for name in ("S", "inverse"):
                shape = (*batch, *inner)
                eye = Dense.identity(n, batch_shape=shape, dtype=wide, device=device)
                members[f"{name}_{side}"] = eye
        return members

    def _statistic(self, unit: Unit, side: str, X: Tensor, part: int) -> StructuredMatrix:
        S = unit.member(f"S_{side}", part)
        return S.project_gram(X.to(S.dtype))

    def _update(self, group: Group, jobs: Iterable[Job]) -> Iterator[Members]:
        for job in jobs:
            new: Members = {}
            for side, U in job.sums.items():
                S = update.moving_average(job.old[f"S_{side}"], U, group["lr_cov"])
                inverse = update.damped_inverse(S.to_dense(), group["damping"])
                new |= {f"S_{side}": S, f"inverse_{side}": Dense(inverse)}
            yield new

    def _pair(
        self, members: Members, products: Products
    ) -> tuple[StructuredMatrix, StructuredMatrix]:
        return members["inverse_K"], members["inverse_C"]

    def _precondition(self, members: Members, products: Products, G: Tensor) -> Tensor:
        K, C = self._pair(members, products)
        return update.precondition_products(K, C, G.to(K.dtype)).to(G.dtype)
