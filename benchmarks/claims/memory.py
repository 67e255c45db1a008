"""Memory and time of the methods of the paper's poster on VGG and CIFAR-shaped images.

``python -m benchmarks.claims.memory`` on a CPU, ``--device cuda`` on a GPU with VGG-16. Bytes are
counted as in :mod:`benchmarks.memory`. Seconds are the processor's (on a GPU those of the clock),
means over a period of T steps, of which one updates the factors; methods take turns, and
the median of the turns counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import memory, nets, optimizers
from benchmarks.claims import common
from benchmarks.claims.common import markdown, table
from benchmarks.nets import DTYPES
from benchmarks.results import Row

METHODS = {
    "SGD": "sgd",
    "AdamW": "adamw",
    "SINGD diagonal": "singd:diagonal",
    "IKFAC": "ikfac",
    "INGD": "singd:dense",
    "KFAC": "kfac",
}
KEY = ("device", "model", "dtype", "T", "method")


class Stepper:
    """A model and an optimizer that take a period of steps."""

    def __init__(self, case: Row) -> None:
        self.loss, self.T = None, int(case["T"])
        model, self.loss = nets.make(case["model"], DTYPES[case["dtype"]], device=case["device"])
        self.optimizer = optimizers.make(METHODS[case["method"]], model, self.T)
        on_gpu = case["device"] == "cuda"
        self.wait: Callable[[], Any] = torch.cuda.synchronize if on_gpu else lambda: None
        self.clock = time.perf_counter if on_gpu else time.process_time

    def period(self) -> float:
        """Milliseconds of a step."""
        self.wait()
        started = self.clock()
        for _ in range(self.T):
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()
        self.wait()
        return 1e3 * (self.clock() - started) / self.T


def times(cases: list[Row], turns: int) -> dict[str, float]:
    """Milliseconds of a step of every method, in turns; the first turn does not count."""
    steppers = {case["method"]: Stepper(case) for case in cases}
    found: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(turns + 1):
        for name, stepper in steppers.items():
            found[name].append(stepper.period())
    return {name: median(values[1:]) for name, values in found.items()}


def measure(group: list[Row], turns: int, kept: dict[str, float], case: Row) -> Row:
    """Bytes of one method, and its time beside those of the others."""
    if not kept:
        kept |= times(group, turns)
    name = METHODS[case["method"]]
    counted = memory.measure(
        name, case["model"], case["dtype"], case["device"], int(case["T"]), peer=False
    )
    peak = max(counted["backward"], counted["step"])
    return {"ms": f"{kept[case['method']]:.2f}", "state": str(counted["state"]), "peak": str(peak)}


def report(rows: list[Row]) -> list[str]:
    """A table for each device, model, data type and T: megabytes, milliseconds, over AdamW's."""
    parts = []
    for group in dict.fromkeys(tuple(r[k] for k in KEY[:-1]) for r in rows):
        own = {r["method"]: r for r in rows if tuple(r[k] for k in KEY[:-1]) == group}
        device, model, dtype, T = group
        lines = []
        for method, r in own.items():
            cells = [f"{int(r[k]) / 1e6:.1f}" for k in ("state", "peak")]
            ratios = [float(r[k]) / float(own["AdamW"][k]) for k in ("peak", "ms")]
            lines.append([method, *cells, r["ms"], *(f"{x:.2f}" for x in ratios)])
        head = ["method", "state, MB", "peak, MB", "ms", "peak / AdamW", "ms / AdamW"]
        parts += [f"`{model}`, {dtype}, {device}, T = {T}:", markdown(head, lines)]
    return parts


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", help="vgg on a CPU, vgg16 on a GPU, if not given")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES))
    parser.add_argument("--T", nargs="+", type=int, default=[1, 10])
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--out", type=Path, default=common.OUT)
    given = parser.parse_args(arguments)
    model = given.model or {"cpu": "vgg", "cuda": "vgg16"}[given.device]
    rows = []
    for T in given.T:
        for dtype in given.dtypes:
            values = (given.device, model, dtype, str(T))
            cases = [dict(zip(KEY, (*values, m), strict=True)) for m in METHODS]
            measured = partial(measure, cases, given.turns, {})
            rows += table(given.out / f"memory_{given.device}.csv", KEY, cases, measured)
    common.write(f"memory_{given.device}", report(rows), given.out)


if __name__ == "__main__":
    main()
