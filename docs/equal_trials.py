"""What the README says of the comparisons with equal trials, from their committed summaries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "benchmarks/results/evidence"
OTHERS = ("SOAP", "Muon", "KFAC")


def read(size: str) -> dict[str, Any]:
    """The summary of one size."""
    found: dict[str, Any] = json.loads((FOLDER / size / "summary.json").read_text())
    return found


def ahead(found: dict[str, Any]) -> str:
    """Which other methods are ahead of SINGD, and on how many tasks, where all were tuned alike."""
    lower = found["lower than SINGD when tuned"]
    parts = [f"{name} on {lower[name]}" for name in OTHERS if lower.get(name)]
    if not parts:
        return "none of " + ", ".join(OTHERS)
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if parts[1:] else parts[0]


def others(short: dict[str, Any], long: dict[str, Any]) -> str:
    """Where SINGD is behind: its worst task in long runs, and methods that are ahead of it."""
    task, ratio = long["worst with nothing searched"]
    return (
        f"In long runs with equal trials it is the {task}, {ratio:.1f} times the tuned AdamW's, "
        f"and others are ahead of it on some of {long['tasks']} tasks: {ahead(long)}. In runs of a "
        f"twentieth: {ahead(short)}."
    )


def said() -> str:
    """:func:`others` of the runs that are there."""
    return others(read("part"), read("long"))
