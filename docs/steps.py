"""The times of whole steps as a table: a line for each method, a column for each case."""

from __future__ import annotations

import csv
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "step.csv"


def markdown() -> str:
    """Times over SGD's; in brackets the overhead over PyPI's, where that was timed."""
    cells: dict[str, dict[str, str]] = {}
    cases: list[str] = []
    with RESULTS.open(newline="") as file:
        for row in csv.DictReader(file):
            case = f"{row['model'].upper()}, T = {row['T']}"
            cases += [case] if case not in cases else []
            ratio = f" ({float(row['ratio']):.2f})" if row["ratio"] else ""
            cells.setdefault(row["method"], {})[case] = f"{float(row['over SGD']):.2f}{ratio}"
    lines = [["method", *cases], ["---", *["--:"] * len(cases)]]
    lines += [[f"`{name}`", *(own.get(case, "") for case in cases)] for name, own in cells.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
