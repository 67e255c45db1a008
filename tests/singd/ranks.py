"""One rank of a data-parallel run, in a process of its own: see test_distributed.py."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from datetime import timedelta
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from singd.step import pipeline
from tests.singd.paper import KFAC, SINGD
from tests.singd.runs import F64, batches, mlp, snapshot

STEPS = 4


class Net(nn.Module):
    """Two layers, a normalization, and a branch that is used where asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.branch = mlp(), mlp(seed=1)
        self.norm = nn.LayerNorm(3, dtype=F64)

    def forward(self, x: Tensor, branch: bool) -> Tensor:
        y = self.norm(self.body(x))
        return y + self.branch(x) if branch else y


class Odd(Net):
    """The same, with a weight also used in a way that hooks do not see, where asked for."""

    def forward(self, x: Tensor, branch: bool) -> Tensor:
        y = super().forward(x, branch)
        return y + self.body[0].weight.exp().sum() if branch else y


class Called(Net):
    """The same, with the branch always called, and its output thrown away where not asked for."""

    def forward(self, x: Tensor, branch: bool) -> Tensor:
        y, more = self.norm(self.body(x)), self.branch(x)
        return y + more if branch else y


def branches(rank: int, part: int, ranks: int) -> bool:
    """Whether this part of a rank's batch takes the branch: the last rank never does."""
    return rank < ranks - 1 or ranks == 1


def shares(total: int, ranks: int) -> list[slice]:
    """Uneven parts of a batch."""
    cuts = [0, *(total * (r + 1) // ranks - (r + 1) % 2 for r in range(ranks - 1)), total]
    return [slice(a, b) for a, b in pairwise(cuts)]


def make(case: dict[str, Any]) -> tuple[nn.Module, Any]:
    model: nn.Module = {"odd": Odd, "called": Called, None: Net}[case.get("net")]()
    method = {"SINGD": SINGD, "KFAC": KFAC}[case["method"]]
    options = {"T": 2, "lr": 0.05, **case.get("options", {})}
    if case["wrapped"]:
        early = method(model, **options) if case.get("wrapped_after") else None
        wrapper: Any = DistributedDataParallel(
            model, find_unused_parameters=True, **case.get("ddp", {})
        )
        return wrapper, early or method(wrapper, **options)
    return model, method(model, **options)


def loss_of(model: nn.Module, X: Tensor, y: Tensor, branch: bool, total: int) -> Tensor:
    """The part of a mean over ``total`` samples."""
    return 0.5 * (model(X, branch) - y).square().sum() / total


def run(case: dict[str, Any], rank: int, ranks: int) -> dict[str, Tensor]:
    """All steps of one rank; gradients are averaged, so a part of the loss counts ``ranks``."""
    model, optimizer = make(case)
    for step, (X, y) in enumerate(batches(STEPS, 13, 4)):
        if case.get("bad") == step and rank == 0:
            X = X * float("nan")
        optimizer.zero_grad()
        share = shares(len(X), ranks)[rank]
        parts = torch.arange(len(X))[share].tensor_split(case.get("micro", 1))
        for i, index in enumerate(parts):
            last = i == len(parts) - 1
            silent = model.no_sync() if case["wrapped"] and not last else nullcontext()
            with silent:
                branch = branches(rank, i, ranks)
                (ranks * loss_of(model, X[index], y[index], branch, len(X))).backward()
            if case.get("count"):
                optimizer.count_terms(len(index))
        optimizer.step()
        if case.get("gpu") and rank == 0:  # for a log, say: the other ranks do not ask
            assert optimizer.skipped == (step >= case["bad"])
    return snapshot(getattr(model, "module", model), optimizer) | {
        "skipped": torch.tensor(optimizer.skipped)
    }


def alone(case: dict[str, Any], ranks: int) -> dict[str, Tensor]:
    """The same run in one process: a backward pass for every part."""
    model, optimizer = make(case | {"wrapped": False})
    for step, (X, y) in enumerate(batches(STEPS, 13, 4)):
        optimizer.zero_grad()
        if case.get("bad") == step:
            X = X * float("nan")
        for rank, share in enumerate(shares(len(X), ranks)):
            for i, index in enumerate(
                torch.arange(len(X))[share].tensor_split(case.get("micro", 1))
            ):
                branch = branches(rank, i, ranks)
                loss_of(model, X[index], y[index], branch, len(X)).backward()
        if case.get("count"):
            optimizer.count_terms(len(X))
        optimizer.step()
    return snapshot(model, optimizer) | {"skipped": torch.tensor(optimizer.skipped)}


def later(case: dict[str, Any]) -> Any:
    """Whether the host learns at the next step that one was skipped, as on a GPU."""
    return mock.patch.object(pipeline, "reading_waits", return_value=case.get("gpu", False))


def worker(rank: int, folder: str, cases: dict[str, dict[str, Any]]) -> None:
    """Run all cases with four ranks, then with the first two; leave what they end with."""
    torch.set_num_threads(1)
    for ranks in (4, 2):
        if rank >= ranks:
            continue
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/meet {ranks}",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=30),
        )
        ended = {}
        for name, case in cases.items():
            with later(case), warnings.catch_warnings():
                warnings.simplefilter("ignore" if case.get("net") == "odd" else "error")
                ended[name] = run(case, rank, ranks)
        torch.save(ended, f"{folder}/{rank} of {ranks}")
        dist.destroy_process_group()
