"""``benchmarks/results/ops.csv`` in short: how often a structure is as fast as dense."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "ops.csv"


def markdown() -> str:
    """One line for each dtype and size, one column for each operation."""
    ratios: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with RESULTS.open(newline="") as file:
        for row in csv.DictReader(file):
            ratios[row["dtype"], row["n"]][row["operation"]].append(float(row["ratio"]))
    operations = list(next(iter(ratios.values())))
    lines = [["dtype", "n", *(f"`{name}`" for name in operations)]]
    lines.append(["---", *["--:"] * (len(operations) + 1)])
    for (dtype, n), found in ratios.items():
        lines.append([dtype, n, *(share(found[name]) for name in operations)])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def share(ratios: list[float]) -> str:
    """``50 of 51``."""
    return f"{sum(ratio <= 1 for ratio in ratios)} of {len(ratios)}"
