"""SINGD's default beside AdamW on the suite, from ``benchmarks/results/suite.csv``."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "suite.csv"
PARTS = {"development": "Development", "held out": "Held out"}

Row = dict[str, str]


class Result(NamedTuple):
    """One task: means over seeds."""

    part: str
    task: str
    rate: str  # of AdamW, the best of those tried
    adamw: float
    singd: float
    bytes: float  # of SINGD's state over those of AdamW's

    @property
    def ratio(self) -> float:
        """Test loss over that of AdamW at its best rate."""
        return self.singd / self.adamw


def read(path: Path = RESULTS, options: str = "") -> list[Result]:
    """Tasks with runs of AdamW and of SINGD, worst first; what diverged is infinite.

    Args:
        path: File of results.
        options: Options of SINGD, as in the file; none are those of ``SINGD(model)``.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found: dict[str, dict[str, list[Row]]] = {}
    own: dict[str, list[Row]] = {}
    for row in rows:
        if row["method"] == "adamw":
            rate = row["options"].removeprefix("lr=")
            found.setdefault(row["task"], {}).setdefault(rate, []).append(row)
        elif row["method"] == "singd" and row["options"] == options:
            own.setdefault(row["task"], []).append(row)
    results = []
    for task, runs in found.items():
        if task in own:
            rate = min(runs, key=lambda rate: loss(runs[rate]))
            ratio = size(own[task]) / size(runs[rate])
            losses = loss(runs[rate]), loss(own[task])
            results.append(Result(own[task][0]["part"], task, rate, *losses, ratio))
    return sorted(results, key=lambda result: -result.ratio)


def loss(rows: list[Row]) -> float:
    """The mean test loss over seeds."""
    mean = fmean(float(row["test loss"]) for row in rows)
    return mean if math.isfinite(mean) else math.inf


def size(rows: list[Row]) -> float:
    """Bytes of the state."""
    return float(rows[0]["state bytes"] or "nan")


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
                lines.append(f"| {r.task} | {r.ratio:.3f} | {losses} | {r.bytes:.2f} |")
    return "\n".join(lines)


def where_not(results: list[Result]) -> str:
    """Where AdamW at its best rate is ahead, in words, part by part."""
    lines = []
    for part, title in reversed(PARTS.items()):
        own = [r for r in results if r.part == part]
        if not own:
            continue
        worse = [f"{r.task} ({r.ratio:.3f})" for r in own if r.ratio > 1]
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
    for options in dict.fromkeys(["", *sorted(row["options"] for row in rows)]):
        own = [r for r in read(path, options) if r.part == "development"]
        if own:
            name = f"`{options.replace(',', ', ')}`" if options else "none"
            good, worst = sum(r.ratio <= 1 for r in own), f"{own[0].ratio:.2f} ({own[0].task})"
            middle = f"{median(r.ratio for r in own):.3f}"
            lines.append(f"| {name} | {good} of {len(own)} | {middle} | {worst} |")
    return "\n".join(lines)


def evidence(results: list[Result]) -> str:
    """What the page on evidence has of the suite."""
    if not results:
        return "The suite has not been run yet: `python -m benchmarks.suite`."
    return f"{where_not(results)}\n\n{table(results)}"


def wins(results: list[Result]) -> str:
    """On how many held-out tasks AdamW is not ahead, as ``7 of 10``."""
    own = [r for r in results if r.part == "held out"]
    return f"{sum(r.ratio <= 1 for r in own)} of {len(own)}"


def worst(results: list[Result]) -> str:
    """Where AdamW is ahead most, in one sentence."""
    own = [r for r in results if r.part == "held out" and r.ratio > 1]
    if not own:
        return "On no held-out task is AdamW ahead."
    return f"The worst is {own[0].task}, where the test loss is {own[0].ratio:.2f} times AdamW's."
