"""What the file of runs says: losses, differences, targets, bytes."""

from __future__ import annotations

import math
from functools import cached_property
from itertools import chain
from statistics import fmean, median, stdev
from typing import Any

from benchmarks.evidence import protocol, search
from benchmarks.evidence.protocol import BASELINE, Setting, Size
from benchmarks.evidence.runs import Runs

KINDS = ("tuned", "one setting")


class Results:
    """What has been run of one size, method by method and task by task.

    Attributes:
        tasks: Those on which nothing of AdamW is missing.
        methods: Those of which nothing is missing on any of these tasks.
    """

    def __init__(self, runs: Runs, size: Size) -> None:
        self.runs, self.size = runs, size
        self.done = {
            (t, m)
            for t in size.tasks
            for m in protocol.METHODS
            if search.is_complete(runs, t, m, size, 1)
            and not any(search.missing(runs, t, [m], size))
        }
        self.tasks = [t for t in size.tasks if (t, BASELINE) in self.done]
        self.methods = [m for m in protocol.METHODS if all((t, m) in self.done for t in self.tasks)]

    def setting(self, kind: str, task: str, method: str) -> Setting | None:
        """The tuned setting, or the one for all tasks; ``None`` if every trial failed."""
        if kind == "one setting":
            return protocol.FIXED[method]
        count = search.rounds(self.runs, task, self.size)
        found = search.best(self.runs, task, method, self.size, count)
        return found.setting if found else None

    def finals(self, kind: str, task: str, method: str) -> list[dict[str, Any]]:
        """The runs with the paired seeds."""
        setting = self.setting(kind, task, method)
        if setting is None:
            return []
        return [self.runs[t] for t in search.finals(task, method, self.size, setting)]

    def losses(self, kind: str, task: str, method: str) -> list[float]:
        """Test losses by seed; infinite where the run failed."""
        rows = self.finals(kind, task, method)
        return [math.inf if r["failed"] else float(r["losses"][-1]) for r in rows] or [math.inf]

    @cached_property
    def target(self) -> dict[str, float]:
        """The mean test loss that the tuned AdamW ends with, by task."""
        return {t: fmean(self.losses("tuned", t, BASELINE)) for t in self.tasks}

    def difference(self, kind: str, task: str, method: str) -> tuple[float, float]:
        """Mean of the paired differences to the tuned AdamW, over its mean, and its error."""
        own, theirs = self.losses(kind, task, method), self.losses("tuned", task, BASELINE)
        if not all(map(math.isfinite, own)):
            return math.inf, math.nan
        d = [(a - b) / self.target[task] for a, b in zip(own, theirs, strict=True)]
        return fmean(d), stdev(d) / len(d) ** 0.5 if len(d) > 1 else math.nan

    def reached(self, kind: str, task: str, method: str) -> tuple[float, float]:
        """Steps and seconds to the target over those of AdamW's run.

        Steps are those at which the mean over seeds first is as low, seconds a median over seeds.
        """
        theirs = median(r["seconds"][-1] for r in self.finals("tuned", task, BASELINE))
        rows = self.finals(kind, task, method)
        if not rows or any(row["failed"] for row in rows):
            return math.inf, math.inf
        for k, step in enumerate(rows[0]["checks"][1:]):
            if fmean(row["losses"][k + 1] for row in rows) <= self.target[task]:
                seconds = median(row["seconds"][k] for row in rows)
                return step / search.steps(task, self.size), seconds / theirs
        return math.inf, math.inf

    def ahead(self, kind: str, task: str, method: str, other: str) -> bool:
        """Whether a method's loss is lower by more than two standard errors of the difference."""
        own, theirs = self.losses(kind, task, method), self.losses(kind, task, other)
        if not all(map(math.isfinite, own + theirs)):
            return all(map(math.isfinite, own))
        d = [a - b for a, b in zip(own, theirs, strict=True)]
        return fmean(d) < -2 * stdev(d) / len(d) ** 0.5

    def bytes_of(self, kind: str, task: str, method: str) -> tuple[float, float]:
        """State, and peak with weights and batch, over those of the tuned AdamW."""
        out = []
        for which, name in ((kind, method), ("tuned", BASELINE)):
            setting, rows = self.setting(which, task, name), self.finals(which, task, name)
            if setting is None:
                return math.nan, math.nan
            peak = self.runs[search.counted(task, name, setting)].get("peak", math.nan)
            out.append((rows[0]["state"], peak))
        (state, peak), (theirs, highest) = out
        return state / theirs, peak / highest

    def ends(self, method: str) -> list[str]:
        """Where the tuned rate is an end of those tried: ``"lowest"``, ``"highest"`` or ``""``."""
        runs, size = self.runs, self.size
        return [
            search.at_border(runs, t, method, size, search.rounds(runs, t, size))
            for t in self.tasks
            if (t, method) in self.done
        ]

    def failed(self, method: str) -> tuple[int, int]:
        """Trials of the search that failed, and all of them."""
        tasks = [t for t in self.tasks if (t, method) in self.done]
        rounds = {t: search.rounds(self.runs, t, self.size) for t in tasks}
        found = (search.searched(t, method, self.size, rounds[t]) for t in tasks)
        trials = list(chain.from_iterable(found))
        return sum(self.runs[t]["failed"] for t in trials), len(trials)
