"""Methods beside each other on the suite, and structures at equal bytes: tables of its runs."""

from __future__ import annotations

import csv
import math
import operator
import re
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

from docs.suite import standard_error, with_error

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"

NAMES = {
    "adamw": "AdamW, five rates",
    "muon": "Muon (PyTorch's)",
    "whitened_muon": "Muon of one-sided SINGD's directions",
    "pytorch_optimizer.soap": "SOAP (`pytorch_optimizer`)",
    "soap": "`SOAP`",
    "soap rank": "`SOAP(rank=16)`",
    "kl_shampoo": "`KLShampoo`",
    "singd": "`SINGD`",
    "singd one-sided": '`SINGD(structures=("dense", "scaled_identity"), burn_in=0, damping=0.001)`',
}
Runs = dict[str, dict[str, dict[str, tuple[float, float]]]]
"""By options, then by task, then by seed: loss and bytes of state."""


class Ratio(NamedTuple):
    """A task: test loss over AdamW's at its best rate, of means over seeds and of every seed."""

    mean: float
    of_seeds: list[float]
    bytes: float  # of state over AdamW's


def read(path: Path) -> dict[str, Runs]:
    """The runs on held-out tasks by method; what diverged is infinite."""
    found: dict[str, Runs] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["part"] != "held out":
                continue
            loss = float(row["test loss"])
            variants = {"scaled_identity": " one-sided", "rank=16": " rank"}
            method = row["method"] + "".join(v for k, v in variants.items() if k in row["options"])
            of_task = found.setdefault(method, {}).setdefault(row["options"], {})
            one = loss if math.isfinite(loss) else math.inf, float(row["state bytes"] or "nan")
            of_task.setdefault(row["task"], {})[row["seed"]] = one
    return found


def best(runs: Runs, task: str, seeds: list[str]) -> dict[str, tuple[float, float]]:
    """The runs of a task with the options whose mean loss over seeds is lowest."""
    tried = (of_task[task] for of_task in runs.values() if task in of_task)
    return min(tried, key=lambda of_seed: fmean(of_seed[seed][0] for seed in seeds))


def ratios(runs: Runs, baseline: Runs) -> dict[str, Ratio]:
    """Every task at the best of the options, with the seeds that all runs have."""
    cells = [cell for each in (runs, baseline) for of in each.values() for cell in of.values()]
    seeds = sorted(set.intersection(*(set(cell) for cell in cells)))
    found = {}
    for task in {task: None for of_task in runs.values() for task in of_task}:
        ours, theirs = (best(each, task, seeds) for each in (runs, baseline))
        means = (fmean(of[seed][0] for seed in seeds) for of in (ours, theirs))
        single = [ours[seed][0] / theirs[seed][0] for seed in seeds]
        size = ours[seeds[0]][1] / theirs[seeds[0]][1]
        found[task] = Ratio(operator.truediv(*means), single, size)
    return found


def middle(of_tasks: dict[str, Ratio]) -> float:
    """The median over tasks."""
    return median(ratio.mean for ratio in of_tasks.values())


def summary(of_tasks: dict[str, Ratio]) -> str:
    """How many are at most 1, the median and the worst, with standard errors over seeds."""
    worst = max(of_tasks, key=lambda task: of_tasks[task].mean)
    good = sum(ratio.mean <= 1 for ratio in of_tasks.values())
    by_seed = zip(*(ratio.of_seeds for ratio in of_tasks.values()), strict=True)
    typical = with_error(middle(of_tasks), standard_error([median(each) for each in by_seed]))
    most = with_error(of_tasks[worst].mean, standard_error(of_tasks[worst].of_seeds), 2)
    return f"{good} of {len(of_tasks)} | {typical} | {most} ({worst})"


def seeds_of(of_tasks: dict[str, Ratio]) -> int:
    """How many seeds all runs have."""
    return len(next(iter(of_tasks.values())).of_seeds)


def state(of_tasks: dict[str, Ratio]) -> str:
    """The median over tasks of bytes of state over AdamW's."""
    return f"{median(ratio.bytes for ratio in of_tasks.values()):.2f}"


def methods(path: Path = RESULTS / "methods.csv") -> str:
    """Every method at its best of the rates, and at the rate that is its default."""
    found = read(path)
    baseline = found.pop("adamw")
    lines = [
        "| method | rates | seeds | at most AdamW's | median | worst | state |",
        "| --- | --- | --: | --: | --: | --: | --: |",
    ]
    tables = {name: ratios(runs, baseline) for name, runs in found.items()}
    for name in sorted(tables, key=lambda name: middle(tables[name])):
        own, table = found[name], tables[name]
        said = f"{seeds_of(table)} | {summary(table)} | {state(table)} |"
        lines.append(f"| {NAMES[name]} | best of {len(own)} | {said}")
        for options, of_task in own.items():
            if re.match(r"lr=(0\.003|3e-3)\b", options):
                at_default = ratios({options: of_task}, baseline)
                said = f"{seeds_of(at_default)} | {summary(at_default)}"
                lines.append(f"| | 3e-3 | {said} | |")
    return "\n".join(lines)


def equal_bytes(path: Path = RESULTS / "equal_bytes.csv") -> str:
    """Structures that were chosen within the bytes of a fixed one, beside it."""
    found = read(path)
    baseline = found["adamw"]
    fixed = {
        re.findall(r"'(.*?)'", options)[0]: runs
        for options, runs in found["singd"].items()
        if options.startswith("structures=(")
    }
    lines = [
        "| structures | at most AdamW's | median | worst | state |",
        "| --- | --: | --: | --: | --: |",
    ]
    for options, chosen in found["automatic"].items():
        (structure,) = re.findall(r"'(.*?)'", options)
        for name, runs in ((f"`{structure}` on both sides", fixed[structure]), ("chosen", chosen)):
            table = ratios({"": runs}, baseline)
            lines.append(f"| {name} | {summary(table)} | {state(table)} |")
    others = {"": "the default's", "structures='auto',": "chosen, `budget=1.5`"}
    for options, name in others.items():
        table = ratios({"": found["singd"][f"{options}burn_in=0,damping=0.001"]}, baseline)
        lines.append(f"| {name} | {summary(table)} | {state(table)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(methods(), equal_bytes(), sep="\n\n")
