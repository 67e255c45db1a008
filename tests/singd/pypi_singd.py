"""Makes ``pypi_singd.pt``: a run of PyPI ``singd`` 0.0.5, saved half way, and how it went on.

::

    PYTHONPATH=.peer python tests/singd/pypi_singd.py    # .peer is made by `make parity`
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FILE = Path(__file__).with_name("pypi_singd.pt")
SAVED_AFTER, STEPS = 4, 6
COMMON: dict[str, Any] = {"lr": 0.02, "damping": 1e-2, "weight_decay": 1e-3, "lr_cov": 0.05}
GROUPS: list[dict[str, Any]] = [
    {"structures": ("hierarchical15_15", "dense"), "T": 3},
    {"structures": ("triltoeplitz", "diagonal"), "T": 1, "normalize_lr_cov": True},
    {"structures": ("diagonal", "triutoeplitz"), "T": 2, "kfac_like": True, "alpha1": 0.0},
    # Updated once before the end: later ones are wrong there (K X for the transpose of K times X).
    {"structures": ("block30diagonal", "dense"), "T": 10, "alpha1": 0.0},
]


def network() -> nn.Sequential:
    """A convolution and linear layers, of which some are wider than 30."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 2, bias=False),
        nn.Flatten(),
        nn.Linear(32, 4),
        nn.Tanh(),
        nn.Linear(4, 31, bias=False),
        nn.Tanh(),
        nn.Linear(31, 2, bias=False),
    )


def groups(model: nn.Sequential) -> list[dict[str, Any]]:
    """The parameters as they are given to the optimizer."""
    layers = (model[2], model[0], model[4], model[6])
    return [
        {"params": list(layer.parameters()), **options}
        for layer, options in zip(layers, GROUPS, strict=True)
    ]


def train(model: nn.Module, optimizer: Any, batches: list[tuple[Tensor, Tensor]]) -> None:
    for X, y in batches:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(X), y).backward()
        optimizer.step()


def main() -> None:
    from singd.optim.optimizer import SINGD

    torch.manual_seed(0)
    model = network()
    optimizer = SINGD(model, groups(model), **COMMON)
    batches = [(torch.randn(6, 1, 5, 5), torch.randn(6, 2)) for _ in range(STEPS)]
    train(model, optimizer, batches[:SAVED_AFTER])
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, batches[SAVED_AFTER:])
    torch.save({**saved, "batches": batches[SAVED_AFTER:], "after": model.state_dict()}, FILE)


if __name__ == "__main__":
    main()
