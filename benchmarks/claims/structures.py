"""What structures cost and what they lose: test loss against bytes and seconds, on every task.

``python -m benchmarks.claims.structures``. Every structure on both sides, and on one side with the
other dense, at the setting of the comparison that is the same on all tasks. Before, a run with
dense factors of a quarter of the steps gives the curvature, from which the nats are counted that
each structure loses (:func:`structured.divergence`), and the spectrum of the curvature.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import fmean, median, stdev

import torch
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks.claims import common
from benchmarks.claims.common import markdown, table
from benchmarks.evidence import protocol
from benchmarks.evidence.methods import singd
from benchmarks.evidence.tasks import TASKS, judge
from benchmarks.evidence.trial import Training, Trial, TrialError, failures
from benchmarks.optimizers import state_tensors
from benchmarks.results import Row
from singd import KFAC
from structured import divergence, inverse_root

SPECS = (
    *("scaled_identity", "diagonal", "lower_toeplitz", "block_diagonal(4)", "block_diagonal(8)"),
    *("block_diagonal(16)", "hierarchical(4, 4)", "hierarchical(8, 8)", "lower_triangular"),
)
PAIRS = (
    ("hierarchical(4, 4)", "block_diagonal(8)"),  # of about equal bytes
    ("hierarchical(8, 8)", "block_diagonal(16)"),
)
SIDES = ("both", "K", "C")
DENSE = ("dense", "both")
DAMPING = protocol.FIXED["SINGD"]["damping"]  # in units of the mean eigenvalue
CURVATURE_BATCHES = 3


def pair(spec: str, side: str) -> tuple[str, str]:
    return spec if side != "C" else "dense", spec if side != "K" else "dense"


def training(task: str, structures: tuple[str, str], seed: int, steps: int) -> Training:
    """SINGD at the setting that is the same on all tasks."""
    setting = protocol.FIXED["SINGD"]
    made = Training(Trial(task, "SINGD", "final", setting, seed, steps))
    made.optimizer = singd(structures)(made.model, setting)
    made.rates = [group["lr"] for group in made.optimizer.param_groups]
    return made


# The curvature -----------------------------------------------------------------------------------


class Spectrum:
    """Kronecker factors of the curvature of every weight, after a quarter of a run."""

    def __init__(self, task: str, steps: int) -> None:
        made = training(task, ("dense", "dense"), 0, steps)
        for _ in range(max(steps // 4, 1)):
            made.step()
        optimizer = KFAC(made.model, T=1, damping=1.0)
        batches = TASKS[task].batches(7, TASKS[task].batch)
        for count, batch in zip(range(1, CURVATURE_BATCHES + 1), batches, strict=False):
            for group in optimizer.param_groups:
                group["lr_cov"] = 1 / count  # means
            optimizer.zero_grad()
            TASKS[task].loss(made.model, batch).backward()
            optimizer.precondition()
        self.factors: list[tuple[Tensor, int, str]] = []  # S, the length of the other side, side
        for state in optimizer.state.values():
            if "S_K" in state:
                S_K, S_C = (state[name][0].double() for name in ("S_K", "S_C"))
                self.factors += [(S_K, len(S_C), "K"), (S_C, len(S_K), "C")]

    def nats(self, spec: str, side: str) -> float:
        """What a structure loses on the sides that have it, for each of the weights' numbers."""
        lost = 0.0
        for S, other, which in self.factors:
            if side in ("both", which):
                added = DAMPING * S.diagonal().mean() + torch.finfo(torch.float32).tiny
                K = inverse_root(spec, S, added)
                lost += float(divergence(K, S, added).clamp(min=0)) * other
        return lost / self.numbers

    @property
    def numbers(self) -> int:
        return sum(len(S) * other for S, other, which in self.factors if which == "K")

    def ranks(self, side: str) -> float:
        """``tr(S)^2 / ||S||^2 / n``, a mean over weights: 1 if flat, 1/n for a spike."""
        own = [S for S, _, which in self.factors if which == side]
        return fmean(float(S.trace() ** 2 / S.square().sum() / len(S)) for S in own)

    def inside(self, size: int) -> float:
        """The share of ``||S||^2`` off the diagonal that lies in blocks of that size."""
        shares = []
        for S, _, _ in self.factors:
            off = S - S.diagonal().diag()
            block = torch.arange(len(S)) // size
            within = off[block[:, None] == block].square().sum()
            shares.append(float(within / off.square().sum().clamp(min=1e-300)))
        return fmean(shares)


# Runs --------------------------------------------------------------------------------------------


def run(case: Row, spectrum: Spectrum) -> Row:
    """Test loss, seconds and bytes of a run, and what its structures lose."""
    structures = pair(case["structure"], case["side"])
    made = training(case["task"], structures, int(case["seed"]), int(case["steps"]))
    loss = math.nan
    try:
        with failures():
            while made.done < int(case["steps"]):
                made.step()
            loss = judge(made.task, made.model, "test")
    except TrialError:
        pass
    nats = 0.0 if case["structure"] == "dense" else spectrum.nats(case["structure"], case["side"])
    return {
        "loss": f"{loss:.6g}",
        "seconds": f"{made.seconds:.3f}",
        "state": str(sum(t.nbytes for t in state_tensors(made.optimizer))),
        "nats": f"{nats:.5g}",
        "rank of K": f"{spectrum.ranks('K'):.4g}",
        "rank of C": f"{spectrum.ranks('C'):.4g}",
        "inside blocks of 8": f"{spectrum.inside(8):.4g}",
    }


Found = dict[tuple[str, str, str], dict[str, float]]  # by task, structure and side


def over_dense(rows: list[Row]) -> Found:
    """By task, structure and side: means over seeds, in units of those of dense factors."""
    found: Found = {}
    names = ("loss", "seconds", "state", "nats")
    for case in dict.fromkeys((r["task"], r["structure"], r["side"]) for r in rows):
        own = [r for r in rows if (r["task"], r["structure"], r["side"]) == case]
        found[case] = {name: fmean(float(r[name]) for r in own) for name in names}
    for (task, *_), values in found.items():
        for name in names[:3]:
            if (task, *DENSE) in found:
                values[f"{name} ratio"] = values[name] / found[task, *DENSE][name]
    return found


def report(rows: list[Row]) -> list[str]:
    """A table for each measure, and how well nats predict the loss."""
    found = over_dense(rows)
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    lines, costs = [], []
    for spec, side in product(SPECS, SIDES):
        own = [found[t, spec, side] for t in tasks]
        cells = [f"{v['loss ratio']:.3f}, {round(v['nats'], 6):.2g}" for v in own]
        lines.append([f"`{spec}`, {side}", *cells])
        shares = (fmean(v[f"{name} ratio"] for v in own) for name in ("state", "seconds"))
        costs.append([f"`{spec}`, {side}", *(f"{x:.2f}" for x in shares)])
    fits = [
        [f"rank correlation of loss and nats, {words}", *(f"{f(found, t):+.2f}" for t in tasks)]
        for words, f in (
            ("both sides", agreement),
            ("K's", partial(agreement, counted="K")),
            ("C's", partial(agreement, counted="C")),
        )
    ]
    fits.append(["standard error of a loss ratio", *(f"{spread(rows, t):.3f}" for t in tasks)])
    for name in ("rank of K", "rank of C", "inside blocks of 8"):
        fits.append([name, *(f"{first(rows, t, name):.3f}" for t in tasks)])
    for new, old in PAIRS:
        order = [f"loss of `{new}` over `{old}`, both sides"]
        for t in tasks:
            a, b = (found[t, spec, "both"] for spec in (new, old))
            order.append(f"{a['loss'] / b['loss']:.3f} ({a['nats'] - b['nats']:+.2g} nats)")
        fits.append(order)
    return [
        markdown(["structure, side", *tasks], lines),
        markdown(["structure, side", "state", "seconds"], costs),
        markdown(["", *tasks], fits),
    ]


def agreement(found: Found, task: str, counted: str = "both") -> float:
    """Spearman's rank correlation of nats lost on the sides that count, and the loss."""
    losses, nats = [], []
    for (t, spec, side), values in found.items():
        if t == task and math.isfinite(values["loss"]):
            has = spec != DENSE[0] and (side in ("both", counted) or counted == "both")
            from_side = side if counted == "both" else counted
            losses.append(values["loss"])
            nats.append(found[task, spec, from_side]["nats"] if has else 0.0)
    return float(spearmanr(nats, losses).statistic)


def spread(rows: list[Row], task: str) -> float:
    """Median over structures of the standard error of the mean log-ratio to the same dense seed."""
    logs: dict[tuple[str, str], dict[str, float]] = {}
    for r in rows:
        if r["task"] == task:
            own = logs.setdefault((r["structure"], r["side"]), {})
            own[r["seed"]] = math.log(float(r["loss"]))
    dense = logs.pop(DENSE)
    ratios = [[log - dense[seed] for seed, log in own.items()] for own in logs.values()]
    return median(stdev(x) / len(x) ** 0.5 if len(x) > 1 else math.nan for x in ratios)


def first(rows: list[Row], task: str, name: str) -> float:
    return next(float(r[name]) for r in rows if r["task"] == task)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=list(protocol.TASKS), metavar="T")
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102])
    parser.add_argument("--steps", type=int, help="of every run; for tests")
    parser.add_argument("--out", type=Path, default=common.OUT)
    given = parser.parse_args(arguments)
    key = ("task", "structure", "side", "seed", "steps")
    cases = [
        dict(zip(key, (t, *case, str(seed), str(given.steps or TASKS[t].steps)), strict=True))
        for t in given.tasks
        for case in [DENSE, *product(SPECS, SIDES)]
        for seed in given.seeds
    ]
    spectrum = cache(Spectrum)
    rows = table(
        given.out / "structures.csv",
        key,
        cases,
        lambda case: run(case, spectrum(case["task"], int(case["steps"]))),
    )
    common.write("structures", report(rows), given.out)


if __name__ == "__main__":
    main()
