"""Stability in half precision: counts of NaN and of divergence over seeds and rates.

``python -m benchmarks.claims.half_precision``. Weights, activations, gradients and factors have the
data type. Bare is the rule of the paper; bounded adds the library's first scale of the factors,
relative damping and bound of their steps. "KFAC, inverted there" inverts in the data type as well,
with every operation rounded to it; the other KFAC inverts in float32. The second table trains
nothing: it is the error of the factors of one layer over the condition number of their target.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.claims import common
from benchmarks.claims.common import BARE, markdown, table
from benchmarks.results import Row
from singd import KFAC, SINGD, KroneckerOptimizer, update
from singd.methods.base import Averages, Options
from singd.methods.kfac import KFACFactors, KroneckerFactored
from structured import Dense

TASKS = ("deep autoencoder", "graph attention")
STEPS = {"deep autoencoder": 100, "graph attention": 60}
SCALES = {"deep autoencoder": 196.0, "graph attention": 1.0}  # of the loss: a sum over pixels
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RATES = (1e-3, 1e-2, 1e-1)
T, LR_COV, DAMPING = 5, 0.03, 1e-3
CONDITIONS = tuple(10.0**k for k in range(1, 9))
N, UPDATES = 48, 600


def inverted_there(S: Tensor, damping: float) -> Tensor:
    """``(S + damping I)^-1`` by Gauss-Jordan elimination; each result is rounded to ``S.dtype``.

    Symmetric positive definite matrices need no pivoting in exact arithmetic.
    """
    n = S.shape[-1]
    eye = torch.eye(n, dtype=S.dtype)
    A = torch.cat([S + damping * eye, eye.expand_as(S)], -1)
    for j in range(n):
        row = A[..., j, :] / A[..., j, j, None]
        A = A - A[..., :, j, None] * row[..., None, :]
        A[..., j, :] = row
    return A[..., n:]


@dataclass
class KFACInvertedThere(KroneckerFactored):
    """KFAC whose averages and inverses are in the data type of the weights."""

    dtype: torch.dtype

    def update(
        self, factors: KFACFactors, statistics: Averages, options: Options, step: int
    ) -> KFACFactors:
        lr_cov, damping = options["lr_cov"], options["damping"]
        S_K = update.kfac_average(factors.S_K, statistics.input.value, lr_cov)
        S_C = update.kfac_average(factors.S_C, statistics.grad.value, lr_cov)
        low = [Dense(S.to_dense().to(self.dtype).to(torch.float32)) for S in (S_K, S_C)]
        inverses = [
            Dense(inverted_there(S.to_dense().to(self.dtype), damping).to(torch.float32))
            for S in low
        ]
        return KFACFactors(low[0], low[1], inverses[0], inverses[1])


def kfac(model: nn.Module, **options: Any) -> Any:
    return KFAC(model, **options)


def kfac_there(model: nn.Module, **options: Any) -> Any:
    dtype = next(model.parameters()).dtype
    defaults = KFAC(model).defaults | options
    max_skipped = defaults.pop("max_skipped")
    return KroneckerOptimizer(
        model, KFACInvertedThere(dtype), None, defaults, max_skipped=max_skipped
    )


def ours(**fixed: Any) -> Callable[..., Any]:
    return lambda model, **options: SINGD(model, **(BARE | options | fixed))


BOUNDED: dict[str, Any] = {"scale_init": True, "relative_damping": True, "factor_clip": 0.5}
METHODS: dict[str, Callable[..., Any]] = {
    "KFAC": kfac,
    "KFAC, inverted there": kfac_there,
    "IKFAC, bare": ours(kfac_like=True),
    "INGD, bare": ours(),
    "SINGD diagonal, bare": ours(structures=("diagonal", "diagonal")),
    "IKFAC, bounded": ours(kfac_like=True, **BOUNDED),
    "INGD, bounded": ours(**BOUNDED),
    "SINGD diagonal, bounded": ours(structures=("diagonal", "diagonal"), **BOUNDED),
    "SINGD, library's default": lambda model, **options: SINGD(
        model, lr=0.1 * options["lr"], max_skipped=None
    ),
}


def stability(out: Path, steps: dict[str, int], seeds: Sequence[int]) -> list[Row]:
    """Runs in every data type; the step is bounded by ``kl_clip``, as in K-FAC."""
    key = ("task", "dtype", "method", "lr", "seed", "steps")
    grid = product(TASKS, DTYPES, METHODS, RATES, seeds)
    cases = [dict(zip(key, map(str, (*g, steps[g[0]])), strict=True)) for g in grid]

    def measure(case: Row) -> Row:
        options: dict[str, Any] = {"lr": float(case["lr"]), "kl_clip": 1e-3, "max_skipped": None}
        options |= {"T": T, "lr_cov": LR_COV, "damping": DAMPING}
        end = common.train(
            case["task"],
            lambda model: METHODS[case["method"]](model, **options),
            steps=steps[case["task"]],
            seed=int(case["seed"]),
            scale=SCALES[case["task"]],
            dtype=DTYPES[case["dtype"]],
        )
        return {"how": end.how, "first": f"{end.first:.5g}", "loss": f"{end.last:.5g}"}

    return table(out / "half_precision.csv", key, cases, measure)


# One layer ---------------------------------------------------------------------------------------


def inputs(condition: float, dtype: torch.dtype) -> Tensor:
    """``[2 N, N]`` with covariances whose eigenvalues go from 1/condition to 1."""
    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(2 * N, N, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(N, N, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(0, -0.5 * math.log10(condition), N, dtype=torch.float64)
    return ((2 * N) ** 0.5 * (U * values) @ V.T).to(dtype)


def spread(P: Tensor, S: Tensor) -> str:
    """The extreme eigenvalues of ``L^T P L`` with ``L L^T = S``: 1 and 1 if ``P = S^-1``."""
    if not P.isfinite().all():
        return "not finite"
    L = torch.linalg.cholesky(S)
    values = torch.linalg.eigvalsh(L.T @ P @ L)
    return f"{values[0]:.2g} to {values[-1]:.2g}"


def of_layer(method: str, condition: float, dtype: torch.dtype, updates: int = UPDATES) -> str:
    """How far the preconditioner of one layer's inputs is from the damped inverse."""
    X = inputs(condition, dtype)
    exact = X.double().T @ X.double() / len(X)
    damping = 0.1 / condition
    target = exact + damping * torch.eye(N, dtype=torch.float64)
    if method == "KFAC":
        return spread(update.kfac_inverse(exact.float(), damping).double(), target)
    if method == "KFAC, inverted there":
        return spread(inverted_there(exact.to(dtype), damping).double(), target)
    layer = nn.Linear(N, 1, bias=False, dtype=dtype)
    options: dict[str, Any] = BARE | {"kfac_like": True, "lr_cov": 0.1, "T": 1, "damping": damping}
    optimizer = SINGD(layer, max_skipped=None, **options)
    for _ in range(updates):
        optimizer.zero_grad()
        layer(X).mean().backward()
        optimizer.precondition()
    K = optimizer.state[layer.weight]["K"][0].double()
    return spread(K @ K.T, target)


def errors(out: Path, updates: int) -> list[Row]:
    """KFAC and IKFAC on one layer."""
    key = ("dtype", "method", "condition", "updates")
    grid = product(DTYPES, ("KFAC", "KFAC, inverted there", "IKFAC"), CONDITIONS, [updates])
    cases = [dict(zip(key, map(str, g), strict=True)) for g in grid]

    def measure(case: Row) -> Row:
        dtype = DTYPES[case["dtype"]]
        return {"spread": of_layer(case["method"], float(case["condition"]), dtype, updates)}

    return table(out / "half_precision_factors.csv", key, cases, measure)


def report(rows: list[Row], factors: list[Row]) -> list[str]:
    """Counts, the best loss, and extreme eigenvalues."""
    lines = []
    for method, dtype in product(METHODS, DTYPES):
        own = [r for r in rows if (r["method"], r["dtype"]) == (method, dtype)]
        cells = [f"{sum(r['how'] == how for r in own)}" for how in ("nan", "diverged", "good")]
        for task in TASKS:
            good = [float(r["loss"]) for r in own if r["task"] == task and r["how"] == "good"]
            cells.append(f"{min(good):.4g}" if good else "")
        lines.append([f"{method}, {dtype}", *cells])
    head = ["method", "NaN", "diverged", "good", *(f"lowest loss, {t}" for t in TASKS)]
    spreads = []
    for dtype, method in dict.fromkeys((r["dtype"], r["method"]) for r in factors):
        own = [r["spread"] for r in factors if (r["dtype"], r["method"]) == (dtype, method)]
        spreads.append([f"{method}, {dtype}", *own])
    return [
        markdown(head, lines),
        markdown(["condition", *(f"{c:.0e}" for c in CONDITIONS)], spreads),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of every run; for tests")
    parser.add_argument("--out", type=Path, default=common.OUT)
    given = parser.parse_args(arguments)
    steps = dict.fromkeys(TASKS, given.steps) if given.steps else STEPS
    rows = stability(given.out, steps, given.seeds)
    factors = errors(given.out, given.steps or UPDATES)
    common.write("half_precision", report(rows, factors), given.out)


if __name__ == "__main__":
    main()
