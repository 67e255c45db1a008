"""Methods beside each other on the suite, and structures at equal bytes: tables of its runs."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path
from statistics import median

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"

NAMES = {
    "adamw": "AdamW, five rates",
    "muon": "Muon (PyTorch's)",
    "whitened_muon": "Muon of one-sided SINGD's directions",
    "pytorch_optimizer.soap": "SOAP (`pytorch_optimizer`)",
    "soap": "`SOAP`",
    "soap rank": "`SOAP(rank=16)`",
    "kl_shampoo": "`KLShampoo`",
    "singd": "`SINGD`",
    "singd one-sided": '`SINGD(structures=("dense", "scaled_identity"))`',
}
Runs = dict[str, dict[str, tuple[float, float]]]  # by options, then by task: loss and bytes


def read(path: Path) -> dict[str, Runs]:
    """The runs on held-out tasks by method; what diverged is infinite."""
    found: dict[str, Runs] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["part"] != "held out":
                continue
            loss = float(row["test loss"])
            variants = {"scaled_identity": " one-sided", "rank=16": " rank"}
            method = row["method"] + "".join(v for k, v in variants.items() if k in row["options"])
            of_task = found.setdefault(method, {}).setdefault(row["options"], {})
            size = float(row["state bytes"] or "nan")
            of_task[row["task"]] = loss if math.isfinite(loss) else math.inf, size
    return found


def best(runs: Runs) -> dict[str, tuple[float, float]]:
    """The lowest loss of every task, over options."""
    tasks = {task for of_task in runs.values() for task in of_task}
    return {task: min(of[task] for of in runs.values() if task in of) for task in tasks}


def summary(values: dict[str, float]) -> str:
    """How many are at most 1, the median and the worst."""
    worst = max(values, key=lambda task: values[task])
    good = sum(value <= 1 for value in values.values())
    middle = median(values.values())
    return f"{good} of {len(values)} | {middle:.3f} | {values[worst]:.2f} ({worst})"


def ratios(
    of_task: dict[str, tuple[float, float]], baseline: dict[str, tuple[float, float]]
) -> dict[str, float]:
    """Losses over those of the baseline."""
    return {task: loss / baseline[task][0] for task, (loss, _) in of_task.items()}


def methods(path: Path = RESULTS / "methods.csv") -> str:
    """Every method at its best of the rates, and at the rate that is its default."""
    found = read(path)
    baseline = best(found.pop("adamw"))
    lines = [
        "| method | rates | at most AdamW's | median | worst | state |",
        "| --- | --- | --: | --: | --: | --: |",
    ]
    order = {name: median(ratios(best(runs), baseline).values()) for name, runs in found.items()}
    for name in sorted(order, key=lambda name: order[name]):
        state = median(size / baseline[task][1] for task, (_, size) in best(found[name]).items())
        of_all = summary(ratios(best(found[name]), baseline))
        lines.append(f"| {NAMES[name]} | best of {len(found[name])} | {of_all} | {state:.2f} |")
        for options, of_task in found[name].items():
            if re.match(r"lr=(0\.003|3e-3)\b", options):
                lines.append(f"| | 3e-3 | {summary(ratios(of_task, baseline))} | |")
    return "\n".join(lines)


def equal_bytes(path: Path = RESULTS / "equal_bytes.csv") -> str:
    """Structures that were chosen within the bytes of a fixed one, beside it."""
    found = read(path)
    baseline = best(found["adamw"])
    fixed = {
        re.findall(r"'(.*?)'", options)[0]: runs
        for options, runs in found["singd"].items()
        if options.startswith("structures=(")
    }
    lines = [
        "| structures | at most AdamW's | median | worst | state |",
        "| --- | --: | --: | --: | --: |",
    ]
    for options, chosen in found["automatic"].items():
        (structure,) = re.findall(r"'(.*?)'", options)
        for name, runs in ((f"`{structure}` on both sides", fixed[structure]), ("chosen", chosen)):
            state = median(size / baseline[task][1] for task, (_, size) in runs.items())
            lines.append(f"| {name} | {summary(ratios(runs, baseline))} | {state:.2f} |")
    for options, name in (("", "the default's"), ("structures='auto'", "chosen, `budget=1.5`")):
        runs = found["singd"][options]
        state = median(size / baseline[task][1] for task, (_, size) in runs.items())
        lines.append(f"| {name} | {summary(ratios(runs, baseline))} | {state:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(methods(), equal_bytes(), sep="\n\n")
