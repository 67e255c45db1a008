"""What statistics of a share of the rows change: test losses, and the time of a step.

::

    python -m benchmarks.sample

Losses are those of tasks of the suite, over the loss with all rows, geometric means over seeds.
Times are of a feed-forward net of 4 layers, 256 and 1024 wide, on 4096 tokens with dense factors,
one thread, in turns.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from itertools import product
from pathlib import Path

import torch
from torch import nn

from benchmarks.results import RESULTS, Row, keep, read
from benchmarks.suite import TASKS
from benchmarks.suite.__main__ import KEY, run
from singd import SINGD

SAMPLES = (1, 4, 16, 64)
LANGUAGE = ("GPT", "T5", "Llama", "MLP-Mixer", "compact transformer")
SEEDS = (0, 1, 2)
TOKENS, WIDTHS, TURNS = (8, 512), (256, 1024), 7


def spec(sample: int) -> str:
    """The method of the suite."""
    fixed = "singd:burn_in=0,damping=0.001"
    return f"{fixed},sample={sample}" if sample > 1 else fixed


def losses(out: Path) -> dict[tuple[str, int], float]:
    """Test loss over that with all rows, by task and sample; what is kept is not repeated."""
    done = {tuple(row[k] for k in KEY): row for row in read(out)}
    found: dict[tuple[str, int, int], float] = {}
    for task, sample, seed in product(LANGUAGE, SAMPLES, SEEDS):
        steps, batch = TASKS[task].steps, TASKS[task].batch
        options = spec(sample).partition(":")[2]
        key = (task, "singd", options, str(seed), str(steps), str(batch))
        if key not in done:
            done[key] = run(task, spec(sample), seed, steps, batch)
            keep(out, [done[key]], KEY)
        found[task, sample, seed] = float(done[key]["test loss"])
    return {
        (task, sample): math.exp(
            statistics.fmean(
                math.log(found[task, sample, seed] / found[task, 1, seed]) for seed in SEEDS
            )
        )
        for task, sample in product(LANGUAGE, SAMPLES)
    }


def net() -> nn.Sequential:
    """Layers as of two blocks of a transformer."""
    torch.manual_seed(0)
    d, h = WIDTHS
    return nn.Sequential(
        nn.Linear(d, h), nn.GELU(), nn.Linear(h, d), nn.Linear(d, h), nn.Linear(h, d)
    )


def times(T: int) -> dict[str, float]:
    """The time of a step over that of SGD, medians of turns."""
    x = torch.randn(*TOKENS, WIDTHS[0])
    models, optimizers = {"SGD": net()}, {}
    optimizers["SGD"] = torch.optim.SGD(models["SGD"].parameters(), lr=1e-3, momentum=0.9)
    for sample in SAMPLES:
        models[f"{sample}"] = net()
        optimizers[f"{sample}"] = SINGD(
            models[f"{sample}"], T=T, burn_in=0, sample=sample, structures=("dense", "dense")
        )
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn, (name, model) in product(range(TURNS + 1), models.items()):
        started = time.process_time()
        for _ in range(T):
            optimizers[name].zero_grad()
            model(x).square().mean().backward()
            optimizers[name].step()
        if turn:
            seconds[name].append((time.process_time() - started) / T)
    return {
        name: statistics.median(a / b for a, b in zip(own, seconds["SGD"], strict=True))
        for name, own in seconds.items()
        if name != "SGD"
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, keep, and print a table."""
    flags = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.sample")
    flags.add_argument("--out", type=Path, default=RESULTS)
    given = flags.parse_args(arguments)
    torch.set_num_threads(1)
    timed = {T: times(T) for T in (1, 10)}
    ratios = losses(given.out / "sample_runs.csv")
    rows: list[Row] = [
        {"sample": f"{sample}"}
        | {f"step, T={T}": f"{timed[T][str(sample)]:.2f}" for T in timed}
        | {task: f"{ratios[task, sample]:.3f}" for task in LANGUAGE}
        for sample in SAMPLES
    ]
    keep(given.out / "sample.csv", rows, ("sample",))
    print("\n".join(["  ".join(rows[0]), *("  ".join(row.values()) for row in rows)]))


if __name__ == "__main__":
    main()
