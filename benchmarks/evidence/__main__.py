"""Run the protocol; what is in the file of runs is not repeated. Then write tables and figures.

``python -m benchmarks.evidence --size full`` goes on where it was stopped. Two processes share the
work by their ``--tasks``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import chain, product
from pathlib import Path
from statistics import median

import torch

from benchmarks.evidence import protocol, report, search
from benchmarks.evidence.protocol import SIZES, Size
from benchmarks.evidence.runs import Runs
from benchmarks.evidence.trial import Trial, run

OUT = Path("benchmarks/results/evidence")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.evidence")
    flags.add_argument("--size", default="part", choices=SIZES)
    flags.add_argument("--tasks", nargs="+", metavar="T", help="some of the tasks")
    flags.add_argument("--methods", nargs="+", metavar="M", help="some of the methods")
    flags.add_argument("--rerun", action="store_true", help="repeat runs that are there")
    flags.add_argument(
        "--report", action="store_true", help="tables and figures alone, of all sizes"
    )
    flags.add_argument("--hours", action="store_true", help="say how long what is missing takes")
    flags.add_argument("--out", type=Path, default=OUT, help="folder of runs, tables, figures")
    return flags


def again(runs: Runs, size: Size, cases: Sequence[tuple[str, str]]) -> Iterator[Trial]:
    """All trials that there are."""
    for trial, _ in list(runs):
        same = trial.stage == "bytes" or trial.steps == search.steps(trial.task, size)
        if same and (trial.task, trial.method) in cases:
            yield trial


def hours(runs: Runs, size: Size, cases: Sequence[tuple[str, str]]) -> str:
    """Hours of two cores that a size takes at most, from the seconds of a step in the runs."""
    total, unknown = 0.0, []
    for task, method in cases:
        known = [
            row["seconds"][-1] / trial.steps
            for trial, row in runs
            if (trial.task, trial.method) == (task, method) and row.get("seconds")
        ]
        if known:
            trials = search.searched(task, method, size, len(size.wider))
            steps = sum(trial.steps for trial in trials) + 2 * size.seeds * search.steps(task, size)
            total += steps * median(known)
        else:
            unknown.append(task)
    names = ", ".join(dict.fromkeys(unknown))
    left = f", and runs without a known time on {names}" if unknown else ""
    return f"{total / 3600 / 2:.1f} hours of two cores at most{left}"


def progress(trials: Iterator[Trial], total: int) -> Iterator[Trial]:
    """With a bar, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield from trials
        return
    with tqdm(trials, total=total, desc="runs", mininterval=2.0, unit="run") as bar:
        for trial in bar:
            bar.set_postfix_str(f"{trial.task}, {trial.method}, {trial.stage}", refresh=False)
            yield trial


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and write the report."""
    given = parser().parse_args(arguments)
    torch.set_num_threads(1)
    size, runs = SIZES[given.size], Runs(given.out / "runs.jsonl")
    tasks = [t for t in size.tasks if not given.tasks or t in given.tasks]
    methods = [m for m in protocol.METHODS if not given.methods or m in given.methods]
    cases = list(product(tasks, methods))
    if given.hours:
        print(hours(runs, size, cases))
        return
    if given.report:
        for name, each in SIZES.items():
            report.write(runs, each, given.out / name)
    else:
        new = chain.from_iterable(search.missing(runs, t, methods, size) for t in tasks)
        trials = again(runs, size, cases) if given.rerun else new
        for trial in progress(trials, len(cases) * (1 + size.points + 2 * (size.seeds + 1))):
            runs.add(trial, run(trial))
        report.write(runs, size, given.out / given.size)


if __name__ == "__main__":
    main()
