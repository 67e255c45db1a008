"""KFAC: the baseline, with a float32 Cholesky inverse of every Kronecker factor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from singd import update
from singd.base import KroneckerOptimizer, in_range
from singd.capture import Statistics, Unit
from structured import Dense, StructuredMatrix


class KFAC(KroneckerOptimizer):
    """Kronecker-factored approximate curvature (Martens & Grosse, arXiv 1503.05671).

    Keeps moving averages of ``S_K`` and ``S_C`` and inverts ``S + damping I`` whenever they change,
    in float32 at least. Shares layers, statistics and the bound of the step with
    :class:`singd.SINGD`; the arguments are its, where they apply. ``lr_cov`` is the weight of new
    statistics in the moving averages, which start from the identity.

    Raises:
        ValueError: If an option is out of range.
        torch.linalg.LinAlgError: In ``step``, if a damped factor is not positive definite.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        lr: float = 0.001,
        momentum: float = 0.9,
        damping: float = 0.001,
        weight_decay: float = 0.0,
        T: int = 10,
        loss_average: str | None = "batch",
        lr_cov: float = 0.05,
        kfac_approx: str = "expand",
        kl_clip: float | None = 1e-4,
        adamw: Mapping[str, Any] | None = None,
        seed: int = 0,
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
            "seed": seed,
        }
        super().__init__(model, params, defaults, adamw)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        in_range("lr_cov", group["lr_cov"], 0.0, 1.0)

    def _statistic(self, unit: Unit, side: str, X: Tensor) -> StructuredMatrix:
        wide = torch.promote_types(X.dtype, torch.float32)
        template = Dense.zeros(X.shape[-2], dtype=wide, device=X.device)
        return template.project_gram(X.to(wide))

    def _update(
        self, unit: Unit, seen: Statistics, scale_K: float, scale_C: Tensor | float
    ) -> None:
        state, group = self.state[unit.weight], unit.group
        for side, S in (("K", scale_K * seen.U_K), ("C", scale_C * seen.U_C)):
            new = S.to_dense()
            eye = torch.eye(S.n, dtype=new.dtype, device=new.device).expand_as(new)
            average = update.moving_average(state.get(f"S_{side}", eye), new, group["lr_cov"])
            state[f"inverse_{side}"] = update.damped_inverse(average, group["damping"])
            state[f"S_{side}"] = average

    def _precondition(self, unit: Unit, G: Tensor) -> Tensor:
        state = self.state[unit.weight]
        if "inverse_K" not in state:  # nothing seen yet: the identity
            return G.clone()
        inverse_K, inverse_C = state["inverse_K"], state["inverse_C"]
        return (inverse_C @ G.to(inverse_C.dtype) @ inverse_K).to(G.dtype)

    def _expected_state(self, unit: Unit) -> dict[str, list[Tensor] | Tensor]:
        *batch, d_out, d_in = unit.shape
        wide = torch.promote_types(unit.weight.dtype, torch.float32)
        expected: dict[str, list[Tensor] | Tensor] = {}
        for side, n in (("K", d_in), ("C", d_out)):
            for name in ("S", "inverse"):
                expected[f"{name}_{side}"] = torch.empty(*batch, n, n, dtype=wide, device="meta")
        return expected
