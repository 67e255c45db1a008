"""Which trials there are, and what was best of those that have been run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from benchmarks.evidence import protocol
from benchmarks.evidence.protocol import SEARCH_SEED, Setting, Size
from benchmarks.evidence.runs import Runs
from benchmarks.evidence.tasks import TASKS
from benchmarks.evidence.trial import Trial


def steps(task: str, size: Size) -> int:
    return max(round(TASKS[task].steps * size.stretch), 2)


def searched(task: str, method: str, size: Size, rounds: int) -> list[Trial]:
    """The one setting, and the points of all rounds so far."""
    if size.searched is not None:
        size = replace(size, stretch=size.searched)
    settings = [protocol.FIXED[method]]
    for wider in size.wider[:rounds]:
        settings += protocol.points(method, size.points, wider)
    return [Trial(task, method, "search", s, SEARCH_SEED, steps(task, size)) for s in settings]


def finals(task: str, method: str, size: Size, setting: Setting) -> list[Trial]:
    """One setting with all seeds."""
    seeds = range(protocol.FIRST_SEED, protocol.FIRST_SEED + size.seeds)
    return [Trial(task, method, "final", setting, seed, steps(task, size)) for seed in seeds]


def counted(task: str, method: str, setting: Setting) -> Trial:
    """The run in which bytes are counted."""
    return Trial(task, method, "bytes", setting, SEARCH_SEED, protocol.COUNTED_STEPS)


def loss(runs: Runs, trial: Trial) -> float:
    """What a run ended with; infinite if it failed."""
    row = runs[trial]
    return math.inf if row["failed"] else float(row["losses"][-1])


def rounds(runs: Runs, task: str, size: Size) -> int:
    """How many rounds there are on a task: one more while some method's best rate is at an end."""
    count = 1
    while count < len(size.wider) and any(
        is_complete(runs, task, method, size, count) and at_border(runs, task, method, size, count)
        for method in protocol.METHODS
    ):
        count += 1
    return count


def is_complete(runs: Runs, task: str, method: str, size: Size, count: int) -> bool:
    """Whether a method has tried everything of the first rounds."""
    return all(trial in runs for trial in searched(task, method, size, count))


def best(runs: Runs, task: str, method: str, size: Size, count: int) -> Trial | None:
    """The trial with the lowest loss on validation data; ``None`` if all failed."""
    trials = [t for t in searched(task, method, size, count) if t in runs]
    found = min(trials, key=lambda t: loss(runs, t), default=None)
    return found if found and math.isfinite(loss(runs, found)) else None


def at_border(runs: Runs, task: str, method: str, size: Size, count: int) -> str:
    """``"lowest"`` or ``"highest"`` if the best rate is that of all tried; ``""`` otherwise."""
    found = best(runs, task, method, size, count)
    if found is None:
        return "lowest"
    rates = [t.setting["rate"] for t in searched(task, method, size, count)]
    ends = {min(rates): "lowest", max(rates): "highest"}
    return ends.get(found.setting["rate"], "")


def missing(runs: Runs, task: str, methods: Sequence[str], size: Size) -> Iterator[Trial]:
    """What is to be run on one task, where every trial is run before the next one is asked for."""
    done = 0
    while done < (count := rounds(runs, task, size)):
        for method in methods:
            yield from (t for t in searched(task, method, size, count) if t not in runs)
        done = count
    for method in methods:
        found = best(runs, task, method, size, done)
        for setting in [protocol.FIXED[method], *([found.setting] if found else [])]:
            trials = [counted(task, method, setting), *finals(task, method, size, setting)]
            yield from (t for t in trials if t not in runs)
