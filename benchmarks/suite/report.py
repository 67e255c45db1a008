"""Test losses over that of AdamW at its best rate, by task."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median

from benchmarks.results import Row
from benchmarks.suite import TASKS

BASELINE = "adamw"


def losses(rows: Iterable[Row]) -> dict[tuple[str, str], float]:
    """Mean test loss over the seeds of every task and method with its options."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        spec = ":".join(filter(None, (row["method"], row["options"])))
        value = float(row["test loss"])
        found.setdefault((row["task"], spec), []).append(
            value if math.isfinite(value) else math.inf
        )
    return {key: sum(values) / len(values) for key, values in found.items()}


def ratios(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """By method with its options, then by task: test loss over AdamW's at its best rate."""
    mean = losses(rows)
    best = {
        task: min(v for (t, spec), v in mean.items() if t == task and spec.startswith(BASELINE))
        for task in TASKS
        if any(t == task and spec.startswith(BASELINE) for t, spec in mean)
    }
    table: dict[str, dict[str, float]] = {}
    for (task, spec), loss in mean.items():
        if task in best:
            table.setdefault(spec, {})[task] = loss / best[task]
    return table


def report(rows: Iterable[Row]) -> str:
    """The ratios as a Markdown table, and how many are at most 1 in either part of the suite."""
    table = ratios(rows)
    lines = [f"| | {' | '.join(table)} |", f"|---|{'--:|' * len(table)}"]
    for part in ("development", "held out"):
        tasks = [name for name, task in TASKS.items() if task.part == part]
        for task in tasks:
            cells = [f"{row[task]:.3f}" if task in row else "" for row in table.values()]
            lines.append(f"| {task} | {' | '.join(cells)} |")
        cells = [summary([row[t] for t in tasks if t in row]) for row in table.values()]
        lines.append(f"| **{part}** | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(values: list[float]) -> str:
    """How many are at most 1, median, worst."""
    if not values:
        return ""
    good = sum(value <= 1 for value in values)
    return f"{good} of {len(values)}, median {median(values):.2f}, worst {max(values):.2f}"
