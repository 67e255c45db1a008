"""KFAC as a torch.optim optimizer: the baseline of the inverse-free methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from singd.methods.kfac import KroneckerFactored
from singd.optimizer import KroneckerOptimizer


class KFAC(KroneckerOptimizer):
    """Kronecker-factored approximate curvature (Martens & Grosse, arXiv 1503.05671).

    Keeps moving averages of ``S_K`` and ``S_C`` and inverts ``S + damping I`` whenever they change,
    in float32 at least::

        every T steps:
            S_K, S_C = (1 - lr_cov) S_K + lr_cov A A^T, (1 - lr_cov) S_C + lr_cov B B^T
        D = (S_C + damping I)^-1 grad (S_K + damping I)^-1

    and the step of :class:`singd.SINGD`, with which it shares layers and statistics; the arguments
    are its, where they apply. ``lr_cov`` is the weight of new statistics in the moving averages,
    which start from the identity. ``damping`` is in units of S; if it is smaller than the rounding
    of S it counts as that.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        lr: float = 3e-3,
        momentum: float = 0.9,
        damping: float = 0.001,
        weight_decay: float = 0.0,
        T: int = 10,
        loss_average: str | None = "batch",
        lr_cov: float = 0.3,
        kfac_approx: str = "expand",
        *,
        sample: int | str = 1,
        decoupled_weight_decay: bool = True,
        kl_clip: float | None = None,
        graft: str | None = "auto",
        max_skipped: int | None = 10,
        seed: int = 0,
        telemetry: Callable[[dict[str, Any]], None] | None = None,
        adamw: Mapping[str, Any] | None = None,
        process_group: Any = None,
        data: Any = None,
        places: Any = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "damping": damping,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "T": T,
            "loss_average": loss_average,
            "lr_cov": lr_cov,
            "sample": sample,
            "kfac_approx": kfac_approx,
            "kl_clip": kl_clip,
            "graft": graft,
            "seed": seed,
        }
        super().__init__(
            model,
            KroneckerFactored(),
            params,
            defaults,
            adamw=adamw,
            max_skipped=max_skipped,
            telemetry=telemetry,
            process_group=process_group,
            data=data,
            places=places,
        )
