"""``benchmarks/results/ops.csv`` in short: how often a structure is as fast as dense."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "ops.csv"


def markdown() -> str:
    """One line for each operation, one column for each dtype and size."""
    ratios: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    cases: dict[str, None] = {}
    with RESULTS.open(newline="") as file:
        for row in csv.DictReader(file):
            case = f"{row['dtype']}, n = {row['n']}"
            cases[case] = None
            ratios[row["operation"]][case].append(float(row["ratio"]))
    lines = [["", *cases], ["---", *["--:"] * len(cases)]]
    for name, found in ratios.items():
        lines.append([f"`{name}`", *(share(found[case]) for case in cases)])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def share(ratios: list[float]) -> str:
    """``50 of 51``."""
    return f"{sum(ratio <= 1 for ratio in ratios)} of {len(ratios)}"
