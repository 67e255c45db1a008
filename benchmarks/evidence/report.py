"""Tables and the figure, from the file of runs alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.evidence import protocol
from benchmarks.evidence.methods import CONSTANT, NO_BURN_IN, VARIANTS
from benchmarks.evidence.outcome import KINDS, Results
from benchmarks.evidence.protocol import BASELINE, SIZES, Size
from benchmarks.evidence.runs import Runs

OURS = "SINGD"  # the row that the sentences are about


def rows(variant: str = "") -> list[str]:
    """The methods as they are, or one of :data:`VARIANTS` of them."""
    named = [m for m in protocol.METHODS if m.endswith(variant)]
    return named if variant else [m for m in named if not m.endswith(VARIANTS)]


def complete(results: Results) -> list[str]:
    """Those that are shown, as far as they have been run on all tasks that AdamW has."""
    return [m for m in rows() if m in results.methods]


def table(results: Results, title: str, cell: Callable[[str, str], str], variant: str = "") -> str:
    """A row for each method, a column for each task."""
    lines = [f"| {title} | {' | '.join(results.tasks)} |"]
    lines.append(f"| --- |{' --: |' * len(results.tasks)}")
    for method in rows(variant):
        cells = [cell(t, method) if (t, method) in results.done else "" for t in results.tasks]
        if any(cells):
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def differences(results: Results, kind: str, variant: str = "") -> str:
    """Test losses less that of the tuned AdamW, in percent of it."""

    def cell(task: str, method: str) -> str:
        if kind == "tuned" and method == BASELINE:
            return f"{results.target[task]:.4g}"
        mean, error = results.difference(kind, task, method)
        losses = results.losses(kind, task, method)
        lost = sum(map(math.isinf, losses))
        return (
            f"{lost} of {len(losses)} failed" if lost else f"{percent(mean)} ± {percent(error)[1:]}"
        )

    return table(results, kind, cell, variant)


def percent(x: float) -> str:
    return f"{100 * x:+.1f}" if abs(x) < 10 else f"{100 * x:+.0f}"


def targets(results: Results, kind: str) -> str:
    """Steps and seconds to AdamW's loss."""

    def cell(task: str, method: str) -> str:
        steps, seconds = results.reached(kind, task, method)
        return "never" if math.isinf(steps) else f"{steps:.1f}, {seconds:.2f}"

    return table(results, kind, cell)


def costs(results: Results) -> str:
    """Medians over tasks, and counts."""
    lines = [
        "| | state, tuned | state, one setting | peak, tuned | peak, one setting | failed "
        "| lowest rate is best | highest rate is best |",
        "| --- |" + " --: |" * 7,
    ]
    for method in rows():
        tasks = [t for t in results.tasks if (t, method) in results.done]
        if not tasks:
            continue
        found = [[results.bytes_of(kind, t, method) for t in tasks] for kind in KINDS]
        cells = [middle([b[i] for b in each]) for i in (0, 1) for each in found]
        failed, count = results.failed(method)
        ends = [results.ends(method).count(end) for end in ("lowest", "highest")]
        lines.append(
            f"| {method} | {' | '.join(cells)} | {failed} of {count} | {ends[0]} | {ends[1]} |"
        )
    return "\n".join(lines)


def middle(values: list[float]) -> str:
    """The median of those that are there."""
    known = [v for v in values if math.isfinite(v)]
    return f"{median(known):.2f}" if known else ""


def shared(results: Results, method: str) -> list[str]:
    """The tasks on which both the method and SINGD have been run."""
    return [t for t in results.tasks if {(t, method), (t, OURS)} <= results.done]


def duels(results: Results) -> str:
    """On how many tasks a method's loss is lower than SINGD's, and on how many higher."""
    lines = [
        "| | tasks | tuned: lower | higher | one setting: lower | higher |",
        "| --- |" + " --: |" * 5,
    ]
    for method in (*rows(), *rows(NO_BURN_IN)):
        tasks = shared(results, method)
        if method != OURS and tasks:
            counts = [
                sum(results.ahead(kind, t, *pair) for t in tasks)
                for kind in KINDS
                for pair in ((method, OURS), (OURS, method))
            ]
            lines.append(f"| {method} | {len(tasks)} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def standing(results: Results, kind: str, method: str = OURS) -> dict[str, list[str]]:
    """Tasks by how the method stands to the tuned AdamW: two standard errors decide."""
    found: dict[str, list[str]] = {"worse": [], "level": [], "better": []}
    for task in results.tasks:
        if (task, method) not in results.done:
            continue
        mean, error = results.difference(kind, task, method)
        level = math.isfinite(mean) and not abs(mean) > 2 * error
        found["level" if level else "worse" if mean > 0 else "better"].append(task)
    return found


def sentences(results: Results) -> str:
    """Where it does not pay first."""
    lines = []
    for kind, words in (("one setting", "With nothing searched"), ("tuned", "Tuned")):
        found = standing(results, kind)
        parts = [
            f"**{word}** on {', '.join(named(results, kind, t) for t in found[how])}"
            if found[how]
            else f"**{word}** on none"
            for how, word in (("worse", "worse"), ("level", "level"), ("better", "better"))
        ]
        lines.append(f"- {words}, `SINGD(model)` is {'; '.join(parts)}.")
    return "\n".join(lines)


def named(results: Results, kind: str, task: str) -> str:
    mean, error = results.difference(kind, task, OURS)
    return f"{task} ({percent(mean)} ± {percent(error)[1:]} %)" if math.isfinite(mean) else task


def share(results: Results) -> str:
    """How much of the protocol the tables show."""
    size, full = results.size, SIZES["full"]
    pairs = [(t, m) for t in results.tasks for m in rows() if (t, m) in results.done]
    ends = [end for method in rows() for end in results.ends(method)]
    parts = [
        f"{len(results.tasks)} of {len(full.tasks)} tasks, and {len(pairs)} of "
        f"{len(full.tasks) * len(rows())} pairs of a task and a method",
        f"{size.points} of {full.points} points in a round of the search",
    ]
    if size.stretch != full.stretch:
        parts.insert(1, f"a {full.stretch / size.stretch:.0f}th of the steps")
    elif size.searched is not None:
        parts[-1] += f", each of a {full.stretch / size.searched:.0f}th of the steps"
    if size.wider != full.wider:
        parts.append(f"{len(size.wider)} of up to {len(full.wider)} rounds")
    if size.seeds != full.seeds:
        parts.append(f"{size.seeds} of {full.seeds} seeds")
    lowest, highest = ends.count("lowest"), ends.count("highest")
    ranges = (
        f"The tuned rate is the lowest of those tried in {lowest} of {len(pairs)} searches, "
        f"and the highest in {highest}"
    )
    more = "; there wider ranges may be better" if lowest + highest else ""
    return (
        f"Of the full protocol this is a part: {'; '.join(parts)}. Cells that are empty were not "
        f"run.\n\n{ranges}{more}."
    )


def summary(results: Results) -> dict[str, Any]:
    """What the README says."""
    losses = {
        t: fmean(results.losses("one setting", t, OURS)) / results.target[t]
        for t in results.tasks
        if (t, OURS) in results.done
    }
    worst = max(losses, key=lambda t: losses[t], default="")
    return {
        "tasks": len(results.tasks),
        "seeds": results.size.seeds,
        "worst with nothing searched": [worst, round(losses.get(worst, math.nan), 3)],
        **{kind: {k: len(v) for k, v in standing(results, kind).items()} for kind in KINDS},
        "lower than SINGD when tuned": {
            method: sum(results.ahead("tuned", t, method, OURS) for t in tasks)
            for method in rows()
            if method != OURS and (tasks := shared(results, method))
        },
    }


def profile(results: Results, path: Path) -> None:
    """The share of tasks on which a method's loss is within a factor of the best one's."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 8, "svg.hashsalt": "profile", "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        for ax, kind in zip(figure.subplots(1, 2, sharey=True), KINDS, strict=True):
            for index, method in enumerate(complete(results)):
                style = {"lw": 2.5} if method == OURS else {"lw": 1.2}
                dashes = "-" if method.startswith(OURS) else "--"
                x, y = steps_of(ratios(results, kind, method))
                ax.step(x, y, dashes, where="post", label=method, color=f"C{index % 10}", **style)
            ax.set(title=kind, xlabel="test loss / that of the best method", xscale="log")
            ax.set(xlim=(1, 10), ylim=(0, 1.05))
        ax = figure.axes[0]
        ax.set_ylabel("share of tasks")
        figure.legend(*ax.get_legend_handles_labels(), loc="outside right upper", frameon=False)
        figure.savefig(path, metadata={"Date": None})


def ratios(results: Results, kind: str, method: str) -> list[float]:
    """Mean test loss over the lowest of all methods, task by task."""
    found = []
    for task in results.tasks:
        means = {m: fmean(results.losses(kind, task, m)) for m in complete(results)}
        found.append(means[method] / min(means.values()))
    return found


def steps_of(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """The corners of the share of values that are at most x, from 1 to 10."""
    inside = sorted(v for v in values if v <= 10)
    return [1.0, *inside, 10.0], [k / len(values) for k in (0, *range(1, len(inside) + 1))] + [
        len(inside) / len(values)
    ]


def write(runs: Runs, size: Size, out: Path) -> None:
    """All that the page shows of one size."""
    results = Results(runs, size)
    if not results.tasks:
        return
    out.mkdir(parents=True, exist_ok=True)
    parts = {
        "sentences": sentences(results),
        "share": share(results),
        "tuned": differences(results, "tuned"),
        "one_setting": differences(results, "one setting"),
        "target_tuned": targets(results, "tuned"),
        "target_one_setting": targets(results, "one setting"),
        "costs": costs(results),
        "duels": duels(results),
    }
    for variant, prefix in ((NO_BURN_IN, "no_burn_in"), (CONSTANT, "constant")):
        for kind in KINDS:
            parts[f"{prefix}_{kind.replace(' ', '_')}"] = differences(results, kind, variant)
    for name, text in parts.items():
        (out / f"{name}.md").write_text(text + "\n")
    (out / "summary.json").write_text(json.dumps(summary(results), indent=2) + "\n")
    profile(results, out / "profile.svg")
    print("\n\n".join(parts.values()))
