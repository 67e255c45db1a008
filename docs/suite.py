"""SINGD's default beside AdamW on the suite, from ``benchmarks/results/suite.csv``."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "suite.csv"
PARTS = {"development": "Development", "held out": "Held out"}


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


def read(path: Path = RESULTS) -> list[Result]:
    """Tasks with runs of AdamW and of ``SINGD(model)``, worst first; what diverged is infinite."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["method"] in ("adamw", "singd")]
    found: dict[str, dict[str, list[dict[str, str]]]] = {}
    for row in rows:
        if row["method"] == "adamw" or not row["options"]:
            method = row["options"].removeprefix("lr=")
            found.setdefault(row["task"], {}).setdefault(method, []).append(row)
    results = []
    for task, runs in found.items():
        own = runs.pop("", None)
        if own and runs:
            rate = min(runs, key=lambda rate: loss(runs[rate]))
            ratio = size(own) / size(runs[rate])
            losses = loss(runs[rate]), loss(own)
            results.append(Result(own[0]["part"], task, rate, *losses, ratio))
    return sorted(results, key=lambda result: -result.ratio)


def loss(rows: list[dict[str, str]]) -> float:
    """The mean test loss over seeds."""
    mean = fmean(float(row["test loss"]) for row in rows)
    return mean if math.isfinite(mean) else math.inf


def size(rows: list[dict[str, str]]) -> float:
    """Bytes of the state."""
    return float(rows[0]["state bytes"] or "nan")


def table(results: list[Result]) -> str:
    """A line for each task, held-out tasks first, the worst on top."""
    lines = [
        "| task | AdamW, best of five rates | at rate | `SINGD(model)` | ratio | state |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for part, title in reversed(PARTS.items()):
        lines.append(f"| **{title}** | | | | | |")
        for r in results:
            if r.part == part:
                losses = f"{r.adamw:.4g} | {r.rate} | {r.singd:.4g}"
                lines.append(f"| {r.task} | {losses} | {r.ratio:.3f} | {r.bytes:.2f} |")
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
