"""AdamW as it is, and what faulty ones are made of."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

BROKEN: dict[type, set[str]] = {}
"""Rows that fail, by class."""

RAW_STEP = torch.no_grad()(inspect.unwrap(Adam.step))  # without what runs hooks


class PlainAdamW(AdamW):
    """PyTorch's own, taking a model."""

    def __init__(
        self, model: nn.Module, params: Any = None, lr: Any = 1e-2, **options: Any
    ) -> None:
        super().__init__(model.parameters() if params is None else params, lr, **options)


class PlainSGD(SGD):
    """PyTorch's own, taking a model."""

    def __init__(
        self, model: nn.Module, params: Any = None, lr: Any = 1e-2, **options: Any
    ) -> None:
        given = model.parameters() if params is None else params
        super().__init__(given, lr, **{"momentum": 0.9, **options})


class Around(PlainAdamW):
    """AdamW with something before and after its step."""

    def before(self) -> None:
        pass

    def after(self) -> None:
        pass

    def step(self, closure: Any = None) -> Any:
        self.before()
        loss = RAW_STEP(self, closure)
        self.after()
        return loss

    def all(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]


def fails(*rows: str) -> Callable[[type], type]:
    def add(cls: type) -> type:
        BROKEN[cls] = set(rows)
        return cls

    return add


SHARES = {"arguments_stay": "PyTorch shares the tensors of a state that is loaded"}
"""Rows that PyTorch's own optimizers do not pass."""

PLAIN: tuple[type[Optimizer], ...] = PlainAdamW, PlainSGD
