"""What the README says of the comparison with equal trials, from its committed summary."""

from __future__ import annotations

import json
from pathlib import Path

SUMMARY = Path(__file__).parents[1] / "benchmarks/results/evidence/part/summary.json"
OTHERS = ("SOAP", "Muon", "KFAC")


def others(path: Path = SUMMARY) -> str:
    """Which other methods are ahead of SINGD, and on how many tasks, where all were tuned alike."""
    found = json.loads(path.read_text())
    lower = found["lower than SINGD when tuned"]
    ahead = [f"{name} on {lower[name]}" for name in OTHERS if lower.get(name)]
    if not ahead:
        return (
            f"Of {found['tasks']} tasks with equal trials, {', '.join(OTHERS)} are ahead on none."
        )
    said = f"{', '.join(ahead[:-1])} and {ahead[-1]}" if ahead[1:] else ahead[0]
    return f"With equal trials, others are ahead of it on some of {found['tasks']} tasks: {said}."
