"""Where a step's time goes, part by part, and what a model of its cost predicts.

    python -m benchmarks.breakdown --models vit --T 10 --methods singd:dense,singd:diagonal

The parts are the scopes that the library names for profilers (:data:`PARTS`):

* ``model``: forward and backward pass, without what the hooks do in them;
* ``capture``: statistics, in the backward pass;
* ``factors``: update of the factors and of what is kept of them;
* ``preconditioning``: the gradients times the factors, and the bound of the step;
* ``parameters``: weight decay, momentum and the step, with AdamW's part;
* ``rest``: what else ``step`` does: looks for what is not finite, finds what is due.

One more period is run under a dispatch mode that counts, for every part, floating-point operations
(of matrix products and FFTs), bytes (read and written by everything that is not a view) and
operations. Predicted is the sum over operations of the larger of flops at the rate of a large
product and bytes at the speed of a large copy, plus the time of the smallest operation, all
measured in the same run. Results go to ``breakdown.csv`` in ``benchmarks/results``, case by case.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from benchmarks import nets, optimizers, workers
from benchmarks.machine import processor
from benchmarks.nets import DTYPES
from benchmarks.results import RESULTS, Row, keep
from singd.ops import profiling
from structured.costs import FREE, PRODUCTS, work

KEY = ("processor", "model", "dtype", "T", "method", "part")
PARTS = {
    "singd::capture": "capture",
    "singd::factors": "factors",
    "singd::directions": "preconditioning",
    "singd::parameters": "parameters",
}
NAMES = ("model", "capture", "factors", "preconditioning", "parameters", "rest")
SECONDS = 6.0  # for a method
WARMUP = 5  # periods, with the first looks whether the layers explain the gradients

Around = Callable[[str], AbstractContextManager[Any]]


@contextmanager
def watched(around: Around) -> Iterator[None]:
    """Within this context every scope in :data:`PARTS` runs in ``around(part)``."""
    scope = torch.profiler.record_function

    def named(name: str, *args: Any) -> AbstractContextManager[Any]:
        return around(PARTS[name]) if name in PARTS else scope(name, *args)

    with (
        mock.patch.object(torch.profiler, "record_function", named),
        mock.patch.object(profiling, "is_profiled", return_value=True),
    ):
        yield


class Clock:
    """Seconds by part. What runs inside another part counts as that alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._busy = False

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        if self._busy:
            yield
            return
        self._busy, start = True, time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - start
            self._busy = False


# The model of costs ------------------------------------------------------------------------------


class Machine(NamedTuple):
    """What the prediction goes by."""

    bandwidth: float  # bytes a second
    rate: float  # floating-point operations a second
    call: float  # seconds of the smallest operation


def machine(dtype: torch.dtype) -> Machine:
    """Of this machine, now: a copy of 64 MiB, a product of size 2048, a sum of two numbers."""
    source = torch.ones((1 << 26) // dtype.itemsize, dtype=dtype)
    target, M, x = torch.empty_like(source), torch.randn(2048, 2048).to(dtype), torch.ones(1)

    def fastest(call: Callable[[], Any], repeat: int = 1) -> float:
        times = []
        for _ in range(10):
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            times.append((time.perf_counter() - start) / repeat)
        return min(times)

    return Machine(
        2 * source.nbytes / fastest(lambda: target.copy_(source)),
        2 * 2048**3 / fastest(lambda: M @ M),
        fastest(lambda: x + x, 1000),
    )


class Demand(TorchDispatchMode):
    """Flops, bytes, operations and predicted seconds, by part."""

    def __init__(self, on: Machine) -> None:
        super().__init__()
        self.on, self.part = on, "model"
        self.total: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        if self.part not in ("model", "rest"):
            yield
            return
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in FREE:
            flops = work(func, args, out) if name in PRODUCTS or name.startswith("_fft") else 0.0
            flops *= 2 if name in PRODUCTS else 1
            tensors = {id(t): t for t in tree_leaves((args, out)) if isinstance(t, Tensor)}
            data = sum(t.nbytes for t in tensors.values())
            best = max(flops / self.on.rate, data / self.on.bandwidth) + self.on.call
            found = self.total[self.part]
            for key, value in zip(COUNTED, (flops, data, 1, best), strict=True):
                found[key] += value
        return out


COUNTED = ("flops", "bytes", "operations", "predicted")


# Measuring ---------------------------------------------------------------------------------------


def breakdown(
    name: str, model_name: str, dtype: str, T: int, on: Machine, seconds: float = SECONDS
) -> dict[str, dict[str, float]]:
    """Measured seconds of a step and what was counted, for every part."""
    clock, demand = Clock(), Demand(on)
    periods: list[dict[str, float]] = []
    with watched(clock):
        model, loss = nets.make(model_name, DTYPES[dtype])
        optimizer = optimizers.make(name, model, T)
        warm_up(loss, optimizer, T)
        clock.seconds.clear()
        until = time.perf_counter() + seconds
        while len(periods) < 3 or time.perf_counter() < until:
            whole, stepping = period(loss, optimizer, T)
            parts = dict(clock.seconds)
            clock.seconds.clear()
            inside = sum(v for k, v in parts.items() if k != "capture")
            parts["rest"] = stepping - inside
            parts["model"] = whole - stepping - parts.get("capture", 0.0)
            periods.append(parts)
    with watched(demand.within):
        model, loss = nets.make(model_name, DTYPES[dtype])
        optimizer = optimizers.make(name, model, T)
        warm_up(loss, optimizer, T)
        with demand:
            period(loss, optimizer, T, demand)
    return {
        part: {"measured": statistics.median(p.get(part, 0.0) for p in periods) / T}
        | {key: demand.total[part][key] / T for key in COUNTED}
        for part in NAMES
    }


def warm_up(loss: Callable[[], Tensor], optimizer: Any, T: int) -> None:
    """Take the steps that are not like all later ones."""
    for _ in range(WARMUP):
        period(loss, optimizer, T)


def period(
    loss: Callable[[], Tensor], optimizer: Any, T: int, demand: Demand | None = None
) -> tuple[float, float]:
    """``T`` training steps; the seconds of all, and those inside of ``step``."""
    stepping, start = 0.0, time.perf_counter()
    for _ in range(T):
        optimizer.zero_grad()
        loss().backward()
        before = time.perf_counter()
        with demand.within("rest") if demand else _nothing():
            optimizer.step()
        stepping += time.perf_counter() - before
    return time.perf_counter() - start, stepping


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.breakdown")
    parser.add_argument("--models", default="mlp,gpt,vit,vgg")
    parser.add_argument("--T", default="10,1")
    parser.add_argument("--dtypes", default="fp32")
    parser.add_argument("--methods", default=",".join(("kfac", *optimizers.OURS)))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for a method")
    parser.add_argument("--out", type=Path, default=RESULTS / "breakdown.csv")
    args = parser.parse_args(argv)
    cases = [
        (model, dtype, T, name)
        for dtype in args.dtypes.split(",")
        for model in args.models.split(",")
        for T in args.T.split(",")
        for name in args.methods.split(",")
    ]
    machines = {dtype: machine(DTYPES[dtype]) for dtype in args.dtypes.split(",")}
    for case in (bar := tqdm(cases)):
        bar.set_postfix_str(" ".join(case))
        model, dtype, T, name = case
        found = breakdown(name, model, dtype, int(T), machines[dtype], args.seconds)
        new: list[Row] = [
            dict(zip(KEY, (processor(), *case, part), strict=True))
            | {"ms": f"{1e3 * values['measured']:.4f}"}
            | {key: f"{values[key]:.0f}" for key in COUNTED[:3]}
            | {"predicted ms": f"{1e3 * values['predicted']:.4f}"}
            for part, values in found.items()
        ]
        keep(args.out, new, KEY)
        for row in new:
            bar.write("  ".join(value.ljust(14) for value in row.values()))


if __name__ == "__main__":
    workers.restart("breakdown")
    main()
