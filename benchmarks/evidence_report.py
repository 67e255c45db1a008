"""The report of :mod:`benchmarks.evidence`: a table in Markdown and the curves."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from benchmarks.evidence import METHODS, Row, read
from benchmarks.tasks import TASKS

PEER = "AdamW"
COMPARED = (
    *(("SINGD", PEER), ("SINGD, AdamW part 1e-2", PEER)),
    ("SINGD, kl_clip 3e-5", "AdamW, lr 1e-3"),
)
UNTUNED = {"AdamW, lr 1e-3": "lr 1e-3", "SINGD, kl_clip 3e-5": "kl_clip 3e-5"}
# Colours of Okabe and Ito, as in the demonstration; dotted is what was not searched for.
STYLES: dict[str, dict[str, Any]] = {
    "AdamW": {"color": "#000000", "lw": 2},
    "SINGD": {"color": "#D55E00", "lw": 2},
    "AdamW, lr 1e-3": {"color": "#000000", "ls": ":"},
    "SINGD, kl_clip 3e-5": {"color": "#D55E00", "ls": ":"},
    "SINGD, AdamW part 1e-2": {"color": "#CC79A7", "lw": 2},
    "SINGD hierarchical": {"color": "#0072B2"},
    "SINGD diagonal": {"color": "#E69F00"},
    "SINGD, T = 1": {"color": "#009E73"},
}


class Outcome(NamedTuple):
    """One method on one task, all seeds; and its costs."""

    rows: list[Row]
    cost: Mapping[str, str]

    @property
    def scores(self) -> list[float]:
        return [row.score for row in self.rows]

    @property
    def steps(self) -> np.ndarray:
        """At which it was judged."""
        count, steps = len(self.rows[0].scores), self.rows[0].trial.steps
        return np.array([steps * (k + 1) // count for k in range(count)])

    @property
    def curve(self) -> np.ndarray:
        """Means over seeds."""
        return np.mean([row.scores for row in self.rows], 0)

    @property
    def seconds_per_step(self) -> float:
        return float(self.cost["milliseconds"]) / 1e3


def outcomes(folder: Path) -> dict[str, dict[str, Outcome]]:
    """By task and method; a method of which seeds are missing is left out."""
    rows = [row for row in read(folder / "evidence.csv") if row.trial.stage == "final"]
    with (folder / "evidence_costs.csv").open(newline="") as file:
        costs = {(r["task"], r["method"]): r for r in csv.DictReader(file)}
    found: dict[str, dict[str, Outcome]] = {}
    for task in TASKS:
        for method in METHODS:
            mine = [r for r in rows if (r.trial.task, r.trial.method) == (task, method)]
            if mine and (task, method) in costs:
                mine.sort(key=lambda row: row.trial.seed)
                found.setdefault(task, {})[method] = Outcome(mine, costs[task, method])
    seeds = max((len(o.rows) for methods in found.values() for o in methods.values()), default=0)
    return {
        task: {name: o for name, o in methods.items() if len(o.rows) == seeds}
        for task, methods in found.items()
    }


# The table ---------------------------------------------------------------------------------------

HEAD = (
    *("method", "setting", "test", "steps to AdamW's", "seconds to AdamW's"),
    *("ms per step", "state bytes"),
)


def markdown(found: Mapping[str, Mapping[str, Outcome]]) -> Iterator[str]:
    for task, methods in found.items():
        better = "higher" if TASKS[task].higher_is_better else "lower"
        steps = next(iter(methods.values())).rows[0].trial.steps
        yield f"**{task}**: {TASKS[task].metric} ({better} is better), {steps} steps"
        yield ""
        yield "| " + " | ".join(HEAD) + " |"
        yield "| --- | --- " + "| --: " * (len(HEAD) - 2) + "|"
        for name, outcome in methods.items():
            yield "| " + " | ".join(cells(task, name, outcome, methods.get(PEER))) + " |"
        yield ""
        for ours, theirs in COMPARED:
            if {ours, theirs} <= methods.keys():
                words = comparison(task, methods[ours], methods[theirs], f"`{theirs}`")
                yield f"- `{ours}` is {words}."
        yield ""


def cells(task: str, name: str, outcome: Outcome, peer: Outcome | None) -> Iterator[str]:
    yield name
    value = outcome.rows[0].trial.value
    yield UNTUNED.get(name, f"{METHODS[name].option} {value:.0e}".replace("e-0", "e-"))
    yield spread(outcome.scores)
    reached = peer and first_reached(task, outcome, fmean(peer.scores))
    yield f"{reached}" if reached else "-"
    yield f"{reached * outcome.seconds_per_step:.1f}" if reached else "-"
    yield f"{float(outcome.cost['milliseconds']):.1f} ({float(outcome.cost['time']):.2f})"
    state, weights = (int(outcome.cost[k]) for k in ("state_bytes", "weight_bytes"))
    yield f"{state:,} ({state / weights:.2f})"


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{fmean(values):.4f} ± {deviation:.4f}"


def first_reached(task: str, outcome: Outcome, target: float) -> int | None:
    """The step at which the mean curve first is as good as ``target``."""
    curve = outcome.curve if TASKS[task].higher_is_better else -outcome.curve
    target = target if TASKS[task].higher_is_better else -target
    reached = np.flatnonzero(curve >= target)
    return int(outcome.steps[reached[0]]) if len(reached) else None


def comparison(task: str, ours: Outcome, theirs: Outcome, name: str) -> str:
    """Who is ahead, by the differences of seeds: both start from equal weights and batches."""
    sign = 1 if TASKS[task].higher_is_better else -1
    differences = [sign * (a - b) for a, b in zip(ours.scores, theirs.scores, strict=True)]
    mean, count = fmean(differences), len(differences)
    error = stdev(differences) / math.sqrt(count) if count > 1 else math.inf
    errors = abs(mean) / error if error else math.inf
    by = f"by {abs(mean):.4f} ({errors:.1f} standard errors)"
    place = "ahead of" if mean > 0 else "behind"
    level = "level: " if abs(mean) <= 2 * error else ""
    return f"{level}{place} {name} {by}"


# The curves --------------------------------------------------------------------------------------


def draw(path: Path, found: Mapping[str, Mapping[str, Outcome]]) -> None:
    """Test score against steps and against seconds, a row for each task."""
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 2.8 * len(found)), layout="constrained")
        axes = figure.subplots(len(found), 2, squeeze=False)
        for row, (task, methods) in zip(axes, found.items(), strict=True):
            for name, outcome in methods.items():
                style = {"lw": 1.3, **STYLES[name], "label": name}
                row[0].plot(outcome.steps, outcome.curve, **style)
                row[1].plot(outcome.steps * outcome.seconds_per_step, outcome.curve, **style)
            row[0].set_ylabel(f"{task}\n\ntest {TASKS[task].metric}")
            for ax in row:
                zoom(ax, TASKS[task].higher_is_better)
        axes[-1, 0].set_xlabel("step")
        axes[-1, 1].set_xlabel("seconds (one core)")
        handles = {h.get_label(): h for ax in axes[:, 0] for h in ax.lines}
        figure.legend(handles=handles.values(), loc="outside right upper", frameon=False)
        figure.savefig(path, dpi=90)


def zoom(ax: Any, higher_is_better: bool) -> None:
    """Leave out the first quarter of the range, where all curves are steep."""
    values = np.concatenate([line.get_ydata() for line in ax.lines])
    ends = np.array([line.get_ydata()[-1] for line in ax.lines])
    values, ends = values[np.isfinite(values)], ends[np.isfinite(ends)]
    if len(ends):
        if higher_is_better:
            ax.set_ylim(ends.min() - 2 * np.ptp(ends) - 0.02, values.max() + 0.005)
        else:
            ax.set_ylim(values.min() - 0.02, ends.max() + 0.3 * np.ptp(values))
    ax.grid(alpha=0.25)


def write(folder: Path) -> None:
    """Both files."""
    found = outcomes(folder)
    text = "\n".join(markdown(found))
    (folder / "evidence.md").write_text(text)
    draw(folder / "evidence.png", found)
    print(text)
