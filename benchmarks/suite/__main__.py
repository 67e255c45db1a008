"""Run methods on tasks; runs that are in the file of results are not repeated.

``python -m benchmarks.suite`` runs AdamW at five rates and ``SINGD(model)``, and prints the table.
"""

from __future__ import annotations

import argparse
import math
from itertools import product
from pathlib import Path

import torch

from benchmarks.results import RESULTS, Row, keep, read
from benchmarks.suite import TASKS, train
from benchmarks.suite.methods import RATES, make, parse
from benchmarks.suite.report import report

KEY = ("task", "method", "options", "seed", "steps", "batch")
DEFAULT = (*(f"adamw:lr={rate:g}" for rate in RATES), "singd")
SMALL = 4  # steps


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.suite")
    flags.add_argument("--methods", nargs="+", default=DEFAULT, metavar="NAME[:OPTION=VALUE,...]")
    flags.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), metavar="T")
    flags.add_argument("--part", choices=("development", "held out"), help="tasks of one part only")
    flags.add_argument("--seeds", nargs="+", type=int, default=[0])
    flags.add_argument("--batch", type=int, help="samples in a batch, in place of the task's")
    flags.add_argument("--out", type=Path, default=RESULTS / "suite.csv")
    flags.add_argument("--small", action="store_true", help=f"{SMALL} steps of AdamW and SINGD")
    return flags


def run(task: str, spec: str, seed: int, steps: int, batch: int) -> Row:
    """One run as a row of the table; ``nan`` where the method gave up."""
    name, _ = parse(spec)
    row = {"task": task, "part": TASKS[task].part, "method": name}
    row |= {"options": spec.partition(":")[2], "seed": str(seed)}
    row |= {"steps": str(steps), "batch": str(batch)}
    try:
        done = train(TASKS[task], make(spec), seed=seed, steps=steps, batch=batch)
    except FloatingPointError:
        return {**row, "test loss": str(math.nan), "seconds": "", "state bytes": ""}
    row |= {"test loss": f"{done.test_loss:.6g}", "seconds": f"{done.seconds:.3f}"}
    return {**row, "state bytes": str(done.state_bytes)}


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing and print the table of all that was asked for."""
    given = parser().parse_args(arguments)
    torch.set_num_threads(1)
    methods = ("adamw:lr=0.003", "singd") if given.small else given.methods
    wanted: list[Row] = []
    names = [n for n in given.tasks if given.part in (None, TASKS[n].part)]
    cases = list(product(given.seeds, names, methods))
    done = {tuple(row[k] for k in KEY): row for row in read(given.out)}
    for seed, name, spec in progress(cases):
        task, (method, _) = TASKS[name], parse(spec)
        steps, batch = SMALL if given.small else task.steps, given.batch or task.batch
        key = (name, method, spec.partition(":")[2], str(seed), str(steps), str(batch))
        if key not in done:
            done[key] = run(name, spec, seed, steps, batch)
            keep(given.out, [done[key]], KEY)
        wanted.append(done[key])
    print(report(wanted))


def progress(cases: list[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    """With a bar, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return cases
    bar: list[tuple[int, str, str]] = tqdm(cases, desc="runs", mininterval=5.0)
    return bar


if __name__ == "__main__":
    main()
