"""Data that ships with the packages, and the loop that the frameworks are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pydoc_data.topics import topics
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.singd.runs import Snapshot, snapshot

Batch = tuple[Tensor, Tensor]


@cache
def digits() -> Batch:
    """Images ``[1797, 64]`` between 0 and 1, and their labels."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)


def loader(count: int, size: int = 16) -> DataLoader[Batch]:
    """The first ``count`` batches, in order."""
    X, y = digits()
    return DataLoader(TensorDataset(X[: count * size], y[: count * size]), size)


def text(count: int, length: int) -> Tensor:
    """Pieces of Python's help texts as bytes, ``[count, length]``."""
    letters = "".join(topics[name] for name in sorted(topics)).encode()[: count * length]
    return torch.tensor(list(letters)).view(count, length)


def classifier() -> nn.Sequential:
    """A network for the digits with a layer for AdamW inside; always the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(64, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 12), nn.Linear(12, 10)
        )


def by_hand(
    model: nn.Module,
    optimizer: Any,
    batches: Sequence[Batch],
    *,
    micro: int = 1,
    clip: float | None = None,
    by_group: bool = False,
    dtype: torch.dtype | None = None,
    scheduler: Any = None,
    scaler: Any = None,
) -> Snapshot:
    """The loop everybody writes; ``by_group`` says in which order gradients enter their norm."""
    for i, (X, y) in enumerate(batches):
        with torch.autocast("cpu", dtype, enabled=dtype is not None, cache_enabled=False):
            loss = nn.functional.cross_entropy(model(X), y) / micro
        (loss if scaler is None else scaler.scale(loss)).backward()
        if (i + 1) % micro:
            continue
        if scaler is not None:
            scaler.unscale_(optimizer)
        if clip is not None and by_group:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(params, clip)
        elif clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
    return snapshot(model, optimizer)
