"""The file of runs: a line of JSON for each, only ever appended to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.evidence.trial import Trial

FIELDS = ("task", "method", "stage", "setting", "seed", "steps")


class Runs:
    """What has been run; several processes may append to one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[tuple[Any, ...], tuple[Trial, dict[str, Any]]] = {}
        self.read()

    def read(self) -> None:
        """Take over the lines of the file; of equal trials the last one counts."""
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                row = json.loads(line)
                trial = Trial(**{name: row.pop(name) for name in FIELDS})
                self.found[trial.key] = (trial, row)

    def __contains__(self, trial: Trial) -> bool:
        return trial.key in self.found

    def __getitem__(self, trial: Trial) -> dict[str, Any]:
        return self.found[trial.key][1]

    def __iter__(self) -> Iterator[tuple[Trial, dict[str, Any]]]:
        return iter(self.found.values())

    def add(self, trial: Trial, result: dict[str, Any]) -> None:
        """Append one line."""
        self.found[trial.key] = (trial, result)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        row = {name: getattr(trial, name) for name in FIELDS} | result
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
