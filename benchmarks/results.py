"""Tables of results: CSV files kept up case by case."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import machine

RESULTS = Path("benchmarks/results")
Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """The rows of a table; none if it does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def keep(
    path: Path, new: Iterable[Row], key: Sequence[str], order: Callable[[Row], Any] | None = None
) -> list[Row]:
    """Put rows in the place of those with equal ``key`` columns, keep all others; the whole table.

    The machine is described in a JSON file beside it.
    """
    rows = {tuple(row[name] for name in key): row for row in read(path)}
    rows |= {tuple(row[name] for name in key): row for row in new}
    table = list(rows.values()) if order is None else sorted(rows.values(), key=order)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(machine(), indent=2) + "\n")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(k for row in table for k in row)))
        writer.writeheader()
        writer.writerows(table)
    return table
