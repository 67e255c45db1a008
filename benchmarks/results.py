"""Tables of results: CSV files kept up case by case."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.machine import machine, processor

RESULTS = Path("benchmarks/results")
Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """The rows of a table; none if it does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def keep(path: Path, new: Iterable[Row], key: Sequence[str]) -> None:
    """Put rows in the place of those with equal ``key`` columns; all others stay.

    The machine is described in a JSON file beside it; all machines are, by their processors, where
    ``"processor"`` is part of the key.
    """
    rows = {tuple(row[name] for name in key): row for row in [*read(path), *new]}
    path.parent.mkdir(parents=True, exist_ok=True)
    described, beside = machine(), path.with_suffix(".json")
    if "processor" in key:
        known = json.loads(beside.read_text()) if beside.exists() else {}
        described = known | {processor(): described}
    beside.write_text(json.dumps(described, indent=2) + "\n")
    with path.open("w", newline="") as file:
        columns = list(dict.fromkeys(k for row in rows.values() for k in row))
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows.values())
