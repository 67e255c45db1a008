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

    ``tuned`` maps a model to the one number chosen for it, the value of the option ``option``.
    """

    make: Callable[..., Optimizer]
    option: str = ""
    tuned: dict[str, float] | None = None
    precisions: tuple[str, ...] = ("fp32", "bf16")

    def __call__(self, model: nn.Module, model_name: str) -> Optimizer:
        options = {self.option: self.tuned[model_name]} if self.tuned else {}
        return self.make(model, **options)


def sgd(model: nn.Module, **options: Any) -> Optimizer:
    return SGD(model.parameters(), momentum=0.9, **options)


def adamw(model: nn.Module, **options: Any) -> Optimizer:
    return AdamW(model.parameters(), **options)


def singd(*structures: str, **fixed: Any) -> Callable[..., Optimizer]:
    """SINGD with one structure for both factors."""

    def make(model: nn.Module, **options: Any) -> Optimizer:
        return SINGD(model, structures=structures * 2, **fixed, **options)

    return make


def by_model(cnn: float, vit: float) -> dict[str, float]:
    return {"CNN": cnn, "ViT": vit}


DEFAULT, USUAL = "SINGD(model)", "AdamW, lr 1e-3"

METHODS: dict[str, Method] = {
    "SGD": Method(sgd, "lr", by_model(0.1, 0.03)),
    "AdamW": Method(adamw, "lr", by_model(0.01, 0.003)),
    "KFAC": Method(KFAC, "kl_clip", by_model(1e-5, 1e-5), precisions=("fp32",)),
    "IKFAC": Method(singd("dense", kfac_like=True), "kl_clip", by_model(1e-4, 3e-5)),
    "INGD": Method(singd("dense"), "kl_clip", by_model(1e-4, 1e-5)),
    "SINGD diagonal": Method(singd("diagonal"), "kl_clip", by_model(1e-4, 3e-5)),
    "SINGD block-diagonal": Method(singd("block_diagonal(16)"), "kl_clip", by_model(1e-4, 3e-5)),
    "SINGD hierarchical": Method(singd("hierarchical(8, 8)"), "kl_clip", by_model(1e-4, 3e-5)),
    "SINGD Toeplitz": Method(singd("lower_toeplitz"), "kl_clip", by_model(1e-4, 3e-5)),
    USUAL: Method(adamw),
    DEFAULT: Method(SINGD),
}
