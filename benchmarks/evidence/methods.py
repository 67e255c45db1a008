"""The methods that are compared; each takes a model and the six numbers of a setting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn, optim

from benchmarks.optimizers import Muon
from singd import KFAC, SINGD, KLShampoo

Make = Callable[[nn.Module, Mapping[str, float]], Any]


def sgd(model: nn.Module, s: Mapping[str, float]) -> Any:
    options = {"momentum": s["momentum"], "weight_decay": s["decay"]}
    return optim.SGD(model.parameters(), lr=s["rate"], **options)


def adam(s: Mapping[str, float]) -> dict[str, Any]:
    """The numbers as options of AdamW."""
    betas = s["momentum"], 1 - s["averaging"]
    return {"lr": s["rate"], "weight_decay": s["decay"], "betas": betas, "eps": s["damping"]}


def adamw(model: nn.Module, s: Mapping[str, float]) -> Any:
    return optim.AdamW(model.parameters(), **adam(s))


def muon(model: nn.Module, s: Mapping[str, float]) -> Any:
    """Steps of Muon have AdamW's length (Liu et al., arXiv 2502.16982)."""
    own = {"momentum": s["momentum"], "weight_decay": s["decay"]}
    own["adjust_lr_fn"] = "match_rms_adamw"  # type: ignore[assignment]
    return Muon(model, s["rate"], muon=own, adamw=adam(s) | {"betas": (0.9, 1 - s["averaging"])})


def soap(model: nn.Module, s: Mapping[str, float]) -> Any:
    import pytorch_optimizer

    return pytorch_optimizer.SOAP(model.parameters(), **adam(s), precondition_frequency=10)


def second_order(s: Mapping[str, float]) -> dict[str, Any]:
    """The numbers as options of ours."""
    own = {"lr": s["rate"], "weight_decay": s["decay"], "momentum": s["momentum"]}
    return own | {"lr_cov": s["averaging"], "damping": s["damping"]}


def kl_shampoo(model: nn.Module, s: Mapping[str, float]) -> Any:
    return KLShampoo(model, **second_order(s))


def kfac(model: nn.Module, s: Mapping[str, float]) -> Any:
    return KFAC(model, **second_order(s))


def ikfac(model: nn.Module, s: Mapping[str, float]) -> Any:
    dense: dict[str, Any] = {"structures": ("dense", "dense"), "kfac_like": True, "burn_in": 0}
    return SINGD(model, **dense, **second_order(s))


def singd(structures: Any = None, **options: Any) -> Make:
    """INGD and SINGD, where the momentum is that of the factors."""

    def make(model: nn.Module, s: Mapping[str, float]) -> Any:
        own = second_order(s) | {"momentum": 0.9, "alpha1": s["momentum"]}
        return SINGD(model, structures=structures, **own, **options)

    return make


STRUCTURES: dict[str, Any] = {
    "SINGD": None,
    "SINGD block-diagonal": ("block_diagonal(16)",) * 2,
    "SINGD hierarchical": ("hierarchical(8, 8)",) * 2,
    "SINGD Toeplitz": ("lower_toeplitz",) * 2,
    "SINGD diagonal": ("diagonal",) * 2,
    "SINGD auto": "auto",
}
"""The rows of SINGD: what differs is ``structures``."""

NO_BURN_IN = ", no burn-in"
"""Added to the name of a row of SINGD whose factors are updated at every T-th step alone."""


OF_OTHERS: dict[str, Make] = {"SGD": sgd, "AdamW": adamw, "Muon": muon, "SOAP": soap}
OURS: dict[str, Make] = {
    "KL-Shampoo": kl_shampoo,
    "KFAC": kfac,
    "IKFAC": ikfac,
    "INGD": singd(("dense", "dense"), burn_in=0),
    **{name + NO_BURN_IN: singd(each, burn_in=0) for name, each in STRUCTURES.items()},
    **{name: singd(each) for name, each in STRUCTURES.items()},
}

CONSTANT = " (rms)"
"""Added to the name of a method whose directions all have one length."""


def constant(make: Make) -> Make:
    """The method with ``graft="rms"``."""

    def made(model: nn.Module, s: Mapping[str, float]) -> Any:
        optimizer = make(model, s)
        for group in optimizer.param_groups:
            group["graft"] = "rms"
        return optimizer

    return made


METHODS = OF_OTHERS | OURS | {name + CONSTANT: constant(make) for name, make in OURS.items()}
"""One entry is one row; nothing else has to be changed for a further one."""

VARIANTS = (NO_BURN_IN, CONSTANT)
"""What the names of rows end with that have tables of their own."""
