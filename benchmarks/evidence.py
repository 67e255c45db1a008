"""SINGD bounded by ``kl_clip`` and AdamW on five tasks, one number searched for each.

    python -m benchmarks.evidence              # all that is not in the results yet, then the report
    python -m benchmarks.evidence --report     # the report alone
    python -m benchmarks.evidence --methods "SINGD diagonal"    # or another of EXTRA

For every task of :mod:`benchmarks.tasks` and every method of :data:`METHODS`:

* ``search``: one run for each of five values of one number, judged on the validation data;
* ``final``: five seeds with the best of them, judged on the test data;
* ``cost``: time of a step, the methods taking turns, and bytes of the optimizer's state.

All runs of a task have equally many steps, under a cosine schedule to zero. Every run is one row of
``evidence.csv`` in ``benchmarks/results``, written when it ends: what is there is not repeated. The
report is ``evidence.md`` and ``evidence.png`` beside it. The defaults of SINGD, which need no
search, are judged by :mod:`benchmarks.suite`.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from benchmarks.cost import BLOCK, STATE_STEPS, state_bytes
from benchmarks.tasks import TASKS, Task
from singd import SINGD

RESULTS = Path(__file__).parent / "results"
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
BOUNDS = (
    3e-7,
    3e-6,
    3e-5,
    3e-4,
    3e-3,
)  # of the square of a step: a ratio of 3.16 in rates, as above
SEEDS, CHECKS, ROUNDS = 5, 10, 7
RULE: dict[str, Any] = {  # the paper's, with its two bounds
    **{"lr": 0.1, "kl_clip": 3e-5, "structures": ("dense", "dense"), "adamw": {"lr": 3e-3}},
    **dict.fromkeys(("relative_damping", "scale_init", "decoupled_weight_decay"), False),
}


@dataclass(frozen=True)
class Method:
    """An optimizer, and the option that is searched for, if any.

    Either over ``values``, or it is what the search of the method ``found_by`` found. ``tasks`` are
    those where the method is another one than SINGD.
    """

    make: Callable[..., Optimizer]
    option: str = ""
    values: tuple[float, ...] = ()
    found_by: str = ""
    tasks: tuple[str, ...] = tuple(TASKS)


def adamw(model: nn.Module, task: Task, **options: Any) -> Optimizer:
    return AdamW(model.parameters(), **options)


def singd(**fixed: Any) -> Callable[..., Optimizer]:
    """SINGD by :data:`RULE`, told what the loss is a mean over."""

    def make(model: nn.Module, task: Task, **options: Any) -> Optimizer:
        return SINGD(model, loss_average=task.loss_average, **{**RULE, **fixed, **options})

    return make


def as_singd(**fixed: Any) -> Method:
    """At the value found for SINGD."""
    return Method(singd(**fixed), "kl_clip", found_by="SINGD")


METHODS: dict[str, Method] = {
    "AdamW": Method(adamw, "lr", RATES),
    "SINGD": Method(singd(), "kl_clip", BOUNDS),
    "AdamW, lr 1e-3": Method(adamw),
    "SINGD, kl_clip 3e-5": Method(singd()),
    # the rate that the search for AdamW finds on the GPT, for what AdamW trains in SINGD too
    "SINGD, AdamW part 1e-2": Method(singd(adamw={"lr": 1e-2}), "kl_clip", BOUNDS, tasks=("GPT",)),
    "SINGD diagonal": as_singd(structures=("diagonal", "diagonal")),
    "SINGD hierarchical": as_singd(structures=("hierarchical(8, 8)", "hierarchical(8, 8)")),
    "SINGD, T = 1": as_singd(T=1),
}
EXTRA = ("SINGD diagonal", "SINGD hierarchical", "SINGD, T = 1")
MAIN = [name for name in METHODS if name not in EXTRA]


@dataclass(frozen=True)
class Trial:
    """One run."""

    task: str
    method: str
    stage: str  # "search" or "final"
    value: float  # of the option searched for; nan if nothing is
    seed: int
    steps: int


@dataclass
class Row:
    """One run and its result, a line of the file."""

    trial: Trial
    loss: float  # of the last 20 batches
    scores: list[float] = field(default_factory=list)  # at equal distances; nan once diverged

    @property
    def score(self) -> float:
        """The last one."""
        return self.scores[-1]


COLUMNS = [*(f.name for f in fields(Trial)), "loss", "scores"]


# Runs --------------------------------------------------------------------------------------------


def start(task: Task, method: Method, value: float, seed: int) -> tuple[nn.Module, Optimizer]:
    """A model, equal for all methods, and its optimizer."""
    torch.manual_seed(seed)
    model = task.model()
    options = {} if math.isnan(value) else {method.option: value}
    return model, method.make(model, task, **options)


def train_step(task: Task, model: nn.Module, optimizer: Optimizer, batch: Any) -> torch.Tensor:
    """One step; the loss before it."""
    optimizer.zero_grad()
    if task.terms is not None and isinstance(optimizer, SINGD):
        optimizer.count_terms(task.terms)
    loss = task.loss(model, batch)
    loss.backward()
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def judge(task: Task, model: nn.Module, split: str) -> float:
    model.eval()
    score = task.score(model, split)
    model.train()
    return score


def run(trial: Trial, checks: int) -> Row:
    """Train, and judge on the way; what diverges is judged no more."""
    task, split = TASKS[trial.task], "test" if trial.stage == "final" else "validation"
    model, optimizer = start(task, METHODS[trial.method], trial.value, trial.seed)
    schedule = CosineAnnealingLR(optimizer, trial.steps)
    torch.manual_seed(trial.seed)  # of dropout, which is then equal for all methods too
    row, losses = Row(trial, math.nan), list[float]()
    due = {trial.steps * (k + 1) // checks for k in range(checks)}
    for step, batch in enumerate(task.batches(split, trial.steps, trial.seed), 1):
        try:
            losses.append(train_step(task, model, optimizer, batch).item())
        except FloatingPointError:
            break
        schedule.step()
        if step in due:
            row.scores.append(judge(task, model, split))
    row.scores += [math.nan] * (len(due) - len(row.scores))
    row.loss = fmean(losses[-20:])
    return row


def best(rows: Iterable[Row], task: str, method: str) -> Row:
    """The run of the search that was judged best; one that diverged never is."""
    sign = 1 if TASKS[task].higher_is_better else -1
    mine = [
        r for r in rows if (r.trial.task, r.trial.method, r.trial.stage) == (task, method, "search")
    ]
    return max(mine, key=lambda r: -math.inf if math.isnan(r.score) else sign * r.score)


def searches(task: str, method: str, steps: int) -> list[Trial]:
    return [Trial(task, method, "search", value, 0, steps) for value in METHODS[method].values]


def finals(task: str, method: str, steps: int, rows: Sequence[Row], seeds: int) -> list[Trial]:
    finder = METHODS[method].found_by or method
    value = best(rows, task, finder).trial.value if METHODS[method].option else math.nan
    return [Trial(task, method, "final", value, seed, steps) for seed in range(seeds)]


# Costs -------------------------------------------------------------------------------------------


def costs(name: str, methods: Sequence[str], rounds: int) -> Iterator[dict[str, Any]]:
    """Milliseconds of a step and bytes of state; the methods take turns, a block of steps each."""
    task = TASKS[name]
    methods = [m for m in methods if name in METHODS[m].tasks]
    pairs = {m: start(task, METHODS[m], math.nan, seed=0) for m in methods}
    data = task.batches("test", (STATE_STEPS + rounds * BLOCK) * len(methods), seed=0)
    seconds: dict[str, list[float]] = {m: [] for m in methods}
    for count in (STATE_STEPS, *[BLOCK] * rounds):
        for m, (model, optimizer) in pairs.items():
            some = [next(data) for _ in range(count)]
            started = time.perf_counter()
            for batch in some:
                train_step(task, model, optimizer, batch)
            seconds[m].append((time.perf_counter() - started) / count)
    first = methods[0]
    for m, (model, optimizer) in pairs.items():
        ratios = [a / b for a, b in zip(seconds[m][1:], seconds[first][1:], strict=True)]
        yield {
            "task": name,
            "method": m,
            "milliseconds": f"{1e3 * median(seconds[m][1:]):.3f}",
            "time": f"{median(ratios):.3f}",
            "state_bytes": state_bytes(optimizer),
            "weight_bytes": sum(p.nbytes for p in model.parameters()),
        }


def write_costs(path: Path, names: Sequence[str], methods: Sequence[str], rounds: int) -> None:
    table = [row for name in tqdm(names, unit="task") for row in costs(name, methods, rounds)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)


# Files -------------------------------------------------------------------------------------------


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    rows = []
    with path.open(newline="") as file:
        for r in csv.DictReader(file):
            trial = Trial(
                *(r["task"], r["method"], r["stage"]),
                *(float(r["value"]), int(r["seed"]), int(r["steps"])),
            )
            rows.append(Row(trial, float(r["loss"]), [float(s) for s in r["scores"].split()]))
    return rows


def append(path: Path, row: Row) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        scores = " ".join(f"{s:.4f}" for s in row.scores)
        writer.writerow([*asdict(row.trial).values(), f"{row.loss:.4g}", scores])


def pending(trials: Iterable[Trial], rows: Sequence[Row]) -> list[Trial]:
    """Those that have no row yet; ``repr`` also compares where a value is nan."""
    done = {repr(row.trial) for row in rows}
    return [trial for trial in trials if repr(trial) not in done]


# The command -------------------------------------------------------------------------------------


def run_all(path: Path, args: argparse.Namespace) -> None:
    """The search, then the runs that it decides on, task by task and method by method."""
    pairs = [(t, m) for m in args.methods for t in args.tasks if t in METHODS[m].tasks]
    steps = {t: args.steps or TASKS[t].steps for t in args.tasks}
    total = sum(len(METHODS[m].values) + args.seeds for _, m in pairs)
    with tqdm(total=total, unit="run", dynamic_ncols=True) as bar:
        for t, m in pairs:
            for stage, checks in (("search", 1), ("final", args.checks)):
                rows = read(path)
                trials = searches(t, m, steps[t])
                if stage == "final":
                    trials = finals(t, m, steps[t], rows, args.seeds)
                todo = pending(trials, rows)
                bar.update(len(trials) - len(todo))
                for trial in todo:
                    bar.set_description(f"{t}, {m}, {stage}")
                    append(path, run(trial, checks))
                    bar.update()


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.evidence", description=__doc__.split("\n")[0])
    parser.add_argument("--report", action="store_true", help="write the report alone")
    parser.add_argument("--runs", action="store_true", help="train alone")
    parser.add_argument("--costs", action="store_true", help="measure times and bytes alone")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--methods", nargs="+", default=MAIN, choices=METHODS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--checks", type=int, default=CHECKS, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    runs, times = args.out / "evidence.csv", args.out / "evidence_costs.csv"
    alone = args.runs or args.costs or args.report
    if args.runs or not alone:
        run_all(runs, args)
    if args.costs or not (alone or times.exists()):
        write_costs(times, args.tasks, args.methods, args.rounds)
    if args.report or not alone:
        from benchmarks import evidence_report  # which imports this module

        evidence_report.write(args.out)


if __name__ == "__main__":
    main()
