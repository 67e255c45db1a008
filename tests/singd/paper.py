"""The optimizers with the paper's bare rule, in units of the curvature: what most tests look at."""

from __future__ import annotations

from typing import Any

from torch import nn

import singd

RULE: dict[str, Any] = {
    "lr": 0.1,
    "kl_clip": 3e-5,
    "graft": None,
    "decoupled_weight_decay": False,
}


class SINGD(singd.SINGD):
    """SINGD, dense unless told otherwise, bounded by ``kl_clip`` alone."""

    adamw_ratio = 0.03

    def __init__(self, model: nn.Module, *args: Any, **options: Any) -> None:
        bare: dict[str, Any] = {"structures": ("dense", "dense"), "lr_cov": 0.3}
        bare |= {"damping": 1e-3, "relative_damping": False, "scale_init": False, "burn_in": 0}
        super().__init__(model, *args, **{**RULE, **bare, **options})


class KFAC(singd.KFAC):
    """KFAC, bounded by ``kl_clip`` alone."""

    adamw_ratio = 0.03

    def __init__(self, model: nn.Module, *args: Any, **options: Any) -> None:
        super().__init__(model, *args, **{**RULE, **options})
