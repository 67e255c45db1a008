"""IKFAC follows KFAC (Theorem 1) over whole training runs.

``python -m benchmarks.claims.ikfac_follows``. Both train in float64 from the same weights on the
same batches, with ``beta_1`` the weight of new statistics in KFAC's averages and the step size of
IKFAC's factors, at every step. One update of IKFAC differs from KFAC's by O(beta_1^2), so
after as many steps as fill the averages, 1/beta_1, factors should differ by O(beta_1).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.claims import common
from benchmarks.claims.common import BARE, markdown, table
from benchmarks.results import Row
from singd import KFAC, SINGD

TASKS = ("deep autoencoder", "PINN, heat equation")
SCALES = {"deep autoencoder": 196.0, "PINN, heat equation": 1e-3}  # of the loss
STEPS = 300
BETAS = (0.08, 0.04, 0.02, 0.01, 0.005)
SHARED: dict[str, Any] = {"lr": 1e-3, "graft": "rms", "T": 1, "damping": 0.01, "max_skipped": None}
CHECKS = 10


def kfac(model: nn.Module, beta: float) -> Any:
    return KFAC(model, lr_cov=beta, decoupled_weight_decay=False, **SHARED)


def ikfac(model: nn.Module, beta: float) -> Any:
    return SINGD(model, lr_cov=beta, kfac_like=True, **(BARE | SHARED))


class Track:
    """Weights and preconditioners along a run."""

    def __init__(self, steps: int) -> None:
        self.due = {max(steps * (k + 1) // CHECKS, 1) - 1 for k in range(CHECKS)}
        self.weights: list[Tensor] = []
        self.factors: list[list[Tensor]] = []

    def __call__(self, step: int, model: nn.Module, optimizer: Any) -> None:
        if step in self.due:
            self.weights.append(flat(model))
            self.factors.append(preconditioners(optimizer))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def preconditioners(optimizer: Any) -> list[Tensor]:
    """``K K^T`` and ``C C^T``, or the damped inverses, of all layers."""
    found = []
    for name in ("K", "C"):
        found += [K @ K.mT for K in common.factors(optimizer, name)]
        for S in common.factors(optimizer, f"S_{name}"):
            eye = torch.eye(S.shape[-1], dtype=S.dtype)
            found.append(torch.linalg.inv(S + SHARED["damping"] * eye))
    return found


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def follow(task: str, beta: float, steps: int) -> Row:
    """Distances between both runs."""
    tracks, ends = [], []
    methods: tuple[Callable[..., Any], ...] = (kfac, ikfac)
    for method in methods:
        tracks.append(Track(steps))
        ends.append(
            common.train(
                task,
                lambda model, method=method: method(model, beta),  # type: ignore[misc]
                steps=steps,
                scale=SCALES[task],
                dtype=torch.float64,
                each_step=tracks[-1],
            )
        )
    if any(end.how == "nan" for end in ends):
        return {"how": ends[1].how, "factors": "", "weights": "", "gap": "", "loss": ""}
    torch.manual_seed(0)
    start = flat(common.TASKS[task].model().double())
    theirs, ours = tracks
    factors = [
        fmean(distance(a, b) for a, b in zip(A, B, strict=True))
        for A, B in zip(ours.factors, theirs.factors, strict=True)
    ]
    weights = [
        float((a - b).norm() / (b - start).norm())
        for a, b in zip(ours.weights, theirs.weights, strict=True)
    ]
    moved = fmean(distance(P, torch.eye(len(P), dtype=P.dtype)) for P in theirs.factors[-1])
    return {
        "how": ends[1].how,
        "factors": f"{max(factors):.3g}",
        "factors at the end": f"{factors[-1]:.3g}",
        "from the identity": f"{moved:.3g}",
        "weights": f"{weights[-1]:.3g}",
        "loss KFAC": f"{ends[0].last:.5g}",
        "loss IKFAC": f"{ends[1].last:.5g}",
    }


def report(rows: list[Row]) -> list[str]:
    """A line for each task and step size."""
    names = ["factors", "factors at the end", "from the identity", "weights"]
    names += ["loss KFAC", "loss IKFAC"]
    lines = [
        [f"{r['task']}, beta_1 {r['beta']}", *(r.get(n, "") or r["how"] for n in names)]
        for r in rows
    ]
    return [markdown(["run", *names], lines)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=common.OUT)
    given = parser.parse_args(arguments)
    key = ("task", "beta", "steps")
    cases = [
        dict(zip(key, map(str, (*g, given.steps)), strict=True)) for g in product(TASKS, BETAS)
    ]
    rows = table(
        given.out / "ikfac_follows.csv",
        key,
        cases,
        lambda case: follow(case["task"], float(case["beta"]), given.steps),
    )
    common.write("ikfac_follows", report(rows), given.out)


if __name__ == "__main__":
    main()
