"""The demonstration: two small models, every method, one table.

    python -m benchmarks.demo            # three seeds, three epochs
    python -m benchmarks.demo --full     # five seeds, ten epochs
    python -m benchmarks.demo --tune     # the learning rates of benchmarks.methods

Trains a CNN and a vision transformer on 4000 digits with every method of
:mod:`benchmarks.methods`, in float32 and bfloat16, and prints for each

* ``state``: bytes of the optimizer's state, relative to those of the weights;
* ``memory``: peak bytes of a training step (weights, gradients, state, activations and what the
  step makes on its way) relative to SGD in the same precision;
* ``time``: processor time of a training step, relative to SGD in the same precision; that of
  ``SINGD(model)`` is of steps of its burn-in, all of which update the factors;
* ``accuracy``: on 1000 other digits after the last step, mean and standard deviation over seeds.

Curves go to ``benchmarks/out/demo.png``, numbers to ``benchmarks/out/demo.csv``. The exit status is
1 unless the defaults train: ``SINGD(model)`` at least as accurate as AdamW at its usual settings.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks import plot
from benchmarks.cost import Cost, measure
from benchmarks.methods import DEFAULT, METHODS, USUAL
from benchmarks.models import MODELS
from benchmarks.nets import DTYPES
from benchmarks.training import History, steps_of, train

ROUNDS, CHECKS = 5, 6
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
COLUMNS = (
    *("model", "precision", "method", "seed", "steps", "state", "memory", "time", "ms_per_step"),
    *("train_loss", "accuracy"),
)


class Cell(NamedTuple):
    """One method on one model in one precision."""

    model: str
    precision: str
    method: str


Runs = dict[Cell, list[History]]
Costs = dict[Cell, Cost]


def cells() -> list[Cell]:
    return [
        Cell(model, precision, name)
        for model in MODELS
        for precision in DTYPES
        for name, method in METHODS.items()
        if precision in method.precisions
    ]


def measure_costs(rounds: int, bar: tqdm) -> Costs:
    """One after the other, with nothing beside them."""
    costs: Costs = {}
    for model in MODELS:
        for precision in DTYPES:
            mine = [cell for cell in cells() if cell[:2] == (model, precision)]
            makers = {c.method: partial(METHODS[c.method], model_name=model) for c in mine}
            measured = measure(model, precision, makers, rounds=rounds)
            costs |= {Cell(model, precision, name): cost for name, cost in measured.items()}
            bar.update(len(mine))
    return costs


def run(cell: Cell, seed: int, steps: int) -> History:
    make = partial(METHODS[cell.method], model_name=cell.model)
    return train(cell.model, make, precision=cell.precision, steps=steps, seed=seed, checks=CHECKS)


def train_all(seeds: int, steps: int, workers: int, bar: tqdm) -> Runs:
    """Every method from every seed, one thread each."""
    runs: Runs = {cell: [History()] * seeds for cell in cells()}
    context, threads = get_context("spawn"), (1,)
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, threads) as pool:
        futures = {
            pool.submit(run, cell, seed, steps): (cell, seed)
            for seed in range(seeds)
            for cell in runs
        }
        for future in as_completed(futures):
            cell, seed = futures[future]
            runs[cell][seed] = future.result()
            bar.update()
    return runs


def tune(seeds: int, steps: int) -> Iterator[str]:
    """The rate of every tuned method with the best mean accuracy, on digits for validation."""
    for name, method in tqdm([(n, m) for n, m in METHODS.items() if m.tuned], unit="method"):
        for model in MODELS:
            found = {}
            for lr in RATES:
                make = partial(method, model_name=model, lr=lr)
                options: dict[str, Any] = {"split": "validation", "steps": steps}
                runs = [train(model, make, seed=seed, **options) for seed in range(seeds)]
                found[lr] = spread(runs)[0]
            scores = "".join(f"  {lr:g}: {score:.3f}" for lr, score in found.items())
            yield f"{name:<22}{model}  {max(RATES, key=found.__getitem__):<6g}{scores}"


def spread(runs: Sequence[History]) -> tuple[float, float]:
    """Mean and standard deviation of the last accuracy over seeds."""
    values = [history.accuracy for history in runs]
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def table(model: str, costs: Costs, runs: Runs) -> Iterator[str]:
    """The rows for one model, both precisions side by side."""
    block = f"{'state':>7}{'memory':>8}{'time':>7}{'accuracy':>16}"
    yield f"{model:<22}" + "".join(f"   {precision:^{len(block)}}" for precision in DTYPES)
    yield " " * 22 + f"   {block}" * len(DTYPES)
    for name in METHODS:
        yield f"{name:<22}" + "".join(
            "   " + entry(Cell(model, precision, name), costs, runs) for precision in DTYPES
        )


def entry(cell: Cell, costs: Costs, runs: Runs) -> str:
    if cell not in runs:
        return f"{'-':>7}{'-':>8}{'-':>7}{'-':>16}"
    cost, (mean, std) = costs[cell], spread(runs[cell])
    return f"{cost.state:7.2f}{cost.memory:8.2f}{cost.time:7.2f}{mean:9.3f} ± {std:.3f} "


def claims(runs: Runs) -> Iterator[tuple[str, bool]]:
    """Whether the defaults train, per model and precision."""
    for model in MODELS:
        for precision in DTYPES:
            ours, theirs = (
                spread(runs[Cell(model, precision, name)])[0] for name in (DEFAULT, USUAL)
            )
            holds = ours >= theirs
            text = f"{model} {precision}: {DEFAULT} {ours:.3f} >= {USUAL} {theirs:.3f}"
            yield f"{text} {'holds' if holds else 'FAILS'}", holds


def write_csv(path: Path, costs: Costs, runs: Runs) -> None:
    """One line per run."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for cell, histories in runs.items():
            cost = costs[cell]
            ratios = (cost.state, cost.memory, cost.time, cost.milliseconds)
            for seed, history in enumerate(histories):
                last = history.losses[-20:]
                numbers = [f"{x:.4g}" for x in (*ratios, fmean(last), history.accuracy)]
                writer.writerow([*cell, seed, len(history.losses), *numbers])


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="five seeds and ten epochs")
    parser.add_argument("--tune", action="store_true", help="search for the learning rates alone")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="folder")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 2, 8))
    parser.add_argument("--seeds", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.seeds = args.seeds or (5 if args.full else 3)
    args.steps = args.steps or steps_of(epochs=10 if args.full else 3)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    torch.set_num_threads(1)
    if args.tune:
        print(*tune(args.seeds, args.steps), sep="\n")
        return 0
    total = len(cells()) * (1 + args.seeds)
    with tqdm(total=total, unit="run", dynamic_ncols=True) as bar:
        costs = measure_costs(args.rounds, bar)
        runs = train_all(args.seeds, args.steps, args.workers, bar)
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / "demo.csv", costs, runs)
    plot.curves(args.out / "demo.png", costs, runs)
    for model in MODELS:
        print(*table(model, costs, runs), "", sep="\n")
    compared = list(claims(runs))
    print(*(line for line, _ in compared), sep="\n")
    print(f"\n{args.out / 'demo.csv'}, {args.out / 'demo.png'}")
    return int(not all(holds for _, holds in compared))


if __name__ == "__main__":
    sys.exit(main())
