"""The methods of the demonstration, with their settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from singd import KFAC, SINGD


@dataclass(frozen=True)
class Method:
    """A row of the table.

    ``tuned`` maps a model to the learning rate that ``python -m benchmarks.demo --tune`` found.
    """

    make: Callable[..., Optimizer]
    tuned: dict[str, float] | None = None
    precisions: tuple[str, ...] = ("fp32", "bf16")

    def __call__(self, model: nn.Module, model_name: str, lr: float | None = None) -> Optimizer:
        lr = lr or (self.tuned and self.tuned[model_name])
        return self.make(model, **({"lr": lr} if lr else {}))


def sgd(model: nn.Module, **options: Any) -> Optimizer:
    return SGD(model.parameters(), momentum=0.9, **options)


def adamw(model: nn.Module, **options: Any) -> Optimizer:
    return AdamW(model.parameters(), **options)


def singd(*structures: str, **fixed: Any) -> Callable[..., Optimizer]:
    """SINGD with one structure for both factors, without a burn-in, as in the paper."""
    fixed = {"burn_in": 0, "damping": 1e-3, **fixed}

    def make(model: nn.Module, **options: Any) -> Optimizer:
        return SINGD(model, structures=structures * 2, **fixed, **options)

    return make


def by_model(cnn: float, vit: float) -> dict[str, float]:
    return {"CNN": cnn, "ViT": vit}


DEFAULT, USUAL = "SINGD(model)", "AdamW, lr 1e-3"

METHODS: dict[str, Method] = {
    "SGD": Method(sgd, by_model(0.1, 0.03)),
    "AdamW": Method(adamw, by_model(0.01, 0.003)),
    "KFAC": Method(KFAC, by_model(3e-3, 0.01), precisions=("fp32",)),
    "IKFAC": Method(singd("dense", kfac_like=True), by_model(3e-3, 3e-3)),
    "INGD": Method(singd("dense"), by_model(3e-3, 3e-3)),
    "SINGD diagonal": Method(singd("diagonal"), by_model(0.01, 1e-3)),
    "SINGD block-diagonal": Method(singd("block_diagonal(16)"), by_model(3e-3, 1e-3)),
    "SINGD hierarchical": Method(singd("hierarchical(8, 8)"), by_model(0.01, 3e-3)),
    "SINGD Toeplitz": Method(singd("lower_toeplitz"), by_model(0.01, 1e-3)),
    USUAL: Method(adamw),
    DEFAULT: Method(SINGD),
}
