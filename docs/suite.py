"""SINGD's default beside AdamW on the suite, from ``benchmarks/results/suite.csv``."""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import NamedTuple

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "suite.csv"
PARTS = {"development": "Development", "held out": "Held out"}

Row = dict[str, str]
Runs = dict[str, Row]  # by seed


class Result(NamedTuple):
    """One task: means over seeds."""

    part: str
    task: str
    rate: str  # of AdamW, the best of those tried
    adamw: float
    singd: float
    bytes: float  # of SINGD's state over those of AdamW's
    error: float  # standard error of the ratio, from those of single seeds

    @property
    def ratio(self) -> float:
        """Test loss over that of AdamW at its best rate."""
        return self.singd / self.adamw


def read(
    path: Path = RESULTS, options: str = "", seeds: Collection[str] | None = None
) -> list[Result]:
    """Tasks with runs of AdamW and of SINGD, worst first; what diverged is infinite.

    Args:
        path: File of results.
        options: Options of SINGD, as in the file; none are those of ``SINGD(model)``.
        seeds: Seeds to look at; all by default, of those that both methods have.
    """
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if seeds is None or row["seed"] in seeds]
    found: dict[str, dict[str, Runs]] = {}
    own: dict[str, Runs] = {}
    for row in rows:
        if row["method"] == "adamw":
            rate = row["options"].removeprefix("lr=")
            found.setdefault(row["task"], {}).setdefault(rate, {})[row["seed"]] = row
        elif row["method"] == "singd" and row["options"] == options:
            own.setdefault(row["task"], {})[row["seed"]] = row
    results = []
    for task, runs in found.items():
        mine = own.get(task, {})
        both = [seed for seed in mine if all(seed in rate for rate in runs.values())]
        if both:
            losses = {rate: [loss(of[seed]) for seed in both] for rate, of in runs.items()}
            singd = [loss(mine[seed]) for seed in both]
            rate = min(losses, key=lambda rate: fmean(losses[rate]))
            ratios = [a / b for a, b in zip(singd, losses[rate], strict=True)]
            bytes_ = size(mine[both[0]]) / size(runs[rate][both[0]])
            means = fmean(losses[rate]), fmean(singd)
            results.append(
                Result(mine[both[0]]["part"], task, rate, *means, bytes_, standard_error(ratios))
            )
    return sorted(results, key=lambda result: -result.ratio)


def loss(row: Row) -> float:
    """The test loss; infinite if it is not finite."""
    found = float(row["test loss"])
    return found if math.isfinite(found) else math.inf


def size(row: Row) -> float:
    """Bytes of the state."""
    return float(row["state bytes"] or "nan")


def table(results: list[Result]) -> str:
    """A line for each task, held-out tasks first, the worst on top."""
    lines = [
        "| task | ratio | `SINGD(model)` | AdamW, best of five rates | its rate | state |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for part, title in reversed(PARTS.items()):
        lines.append(f"| **{title}** | | | | | |")
        for r in results:
            if r.part == part:
                losses = f"{r.singd:.4g} | {r.adamw:.4g} | {r.rate}"
                lines.append(f"| {r.task} | {ratio(r)} | {losses} | {r.bytes:.2f} |")
    return "\n".join(lines)


def standard_error(of_seeds: Sequence[float]) -> float:
    """That of their mean; not a number of one alone, or if not all are finite."""
    if len(of_seeds) < 2 or not all(map(math.isfinite, of_seeds)):
        return math.nan
    return stdev(of_seeds) / len(of_seeds) ** 0.5


def with_error(value: float, error: float, digits: int = 3) -> str:
    """A number with its standard error, if there is one."""
    said = f"{value:.{digits}f}"
    return said if math.isnan(error) else f"{said} ± {error:.{digits}f}"


def ratio(r: Result) -> str:
    """The ratio with its standard error, if there is one."""
    return with_error(r.ratio, r.error)


def where_not(results: list[Result]) -> str:
    """Where AdamW at its best rate is ahead, in words, part by part."""
    lines = []
    for part, title in reversed(PARTS.items()):
        own = [r for r in results if r.part == part]
        if not own:
            continue
        worse = [f"{r.task} ({ratio(r)})" for r in own if r.ratio > 1]
        name = f"**{title}**, {len(own)} tasks"
        said = (
            f"AdamW is ahead on {len(worse)}: {', '.join(worse)}"
            if worse
            else "AdamW is ahead on none"
        )
        lines.append(f"- {name}: {said}; the median ratio is {median(r.ratio for r in own):.3f}.")
    return "\n".join(lines)


def variants(path: Path = RESULTS) -> str:
    """What single options change on the tasks for development: a line for each."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "singd"]
    lines = [
        "| option | at most AdamW's loss | median ratio | worst |",
        "| --- | --: | --: | --: |",
    ]
    seeds: dict[str, set[str]] = {}
    for row in rows:
        seeds.setdefault(row["options"], set()).add(row["seed"])
    common = set.intersection(*seeds.values())
    for options in dict.fromkeys(["", *sorted(seeds)]):
        own = [r for r in read(path, options, common) if r.part == "development"]
        if own:
            name = f"`{options.replace(',', ', ')}`" if options else "none"
            good, worst = sum(r.ratio <= 1 for r in own), f"{own[0].ratio:.2f} ({own[0].task})"
            middle = f"{median(r.ratio for r in own):.3f}"
            lines.append(f"| {name} | {good} of {len(own)} | {middle} | {worst} |")
    return "\n".join(lines)


def beside(*options: str, path: Path = RESULTS) -> str:
    """The default and other options, on all tasks with runs of all: a line for each task."""
    others = [{r.task: r for r in read(path, each)} for each in options]
    names = [f"`{each.replace(',', ', ')}`" for each in options]
    lines = [f"| task | default | {' | '.join(names)} |", "| --- |" + " --: |" * (1 + len(names))]
    for part, title in reversed(PARTS.items()):
        lines.append(f"| **{title}** |" + " |" * (1 + len(names)))
        for r in read(path):
            if r.part == part and all(r.task in other for other in others):
                cells = [ratio(r), *(ratio(other[r.task]) for other in others)]
                lines.append(f"| {r.task} | {' | '.join(cells)} |")
    return "\n".join(lines)


def evidence(results: list[Result]) -> str:
    """What the page on evidence has of the suite."""
    if not results:
        return "The suite has not been run yet: `python -m benchmarks.suite`."
    return f"{where_not(results)}\n\n{table(results)}"


def wins(results: list[Result]) -> str:
    """On how many tasks AdamW is not ahead, as ``13 of 19``."""
    return f"{sum(r.ratio <= 1 for r in results)} of {len(results)}"


def worst(results: list[Result]) -> str:
    """Where AdamW is ahead most, in one sentence."""
    own = [r for r in results if r.ratio > 1]
    if not own:
        return "On no task is AdamW ahead."
    return f"The worst is {own[0].task}, where the test loss is {own[0].ratio:.2f} times AdamW's."
