"""The trace terms of INGD: with both, one or none of them, and with Riemannian momentum.

``python -m benchmarks.claims.trace_terms``. The rule for K, and alike for C, is::

    m_K = alpha_1 m_K + 1/2 (t H_K + lambda d Pi(K^T K) - I)

with ``t = mean(H_C)`` (adaptive curvature) or 1, and ``d = mean(C^T C)`` (adaptive damping) or 1.
Both are INGD, none is IKFAC.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.claims import common
from benchmarks.claims.common import BARE, Outcome, markdown, table
from benchmarks.evidence.tasks import TASKS as EVERY_TASK
from benchmarks.results import Row
from singd import KFAC, SINGD, KroneckerOptimizer, update
from singd.methods.base import Averages, Method, Options, Stack
from singd.methods.inverse_free import InverseFree, InverseFreeFactors
from singd.methods.scale import begun, dampings
from structured import StructuredMatrix

# Tasks, each with a factor of its loss. The autoencoder's is a mean over 196 pixels, or their sum;
# that of graph attention is large at first, and as it is every run of the bare rule fails.
TASKS = (("deep autoencoder", 1.0), ("deep autoencoder", 196.0), ("graph attention", 0.01))
STEPS = {"deep autoencoder": 100, "graph attention": 50}
RATES, LR_COV = (1e-4, 1e-3, 1e-2, 1e-1), (0.01, 0.03, 0.1, 0.3)
SCALES = (1e-3, 1.0, 1e3)
T, DAMPING = 5, 1e-3


@dataclass(frozen=True)
class Variant:
    """Which terms there are."""

    curvature: bool
    damping: bool
    alpha1: float = 0.0


VARIANTS = {
    "none (IKFAC)": Variant(False, False),
    "curvature alone": Variant(True, False),
    "damping alone": Variant(False, True),
    "both (INGD)": Variant(True, True),
    "none, momentum 0.6": Variant(False, False, 0.6),
    "both, momentum 0.6": Variant(True, True, 0.6),
}


class TraceTerms(InverseFree):
    """The rule above with any of the terms, for dense factors in float32."""

    def __init__(self, curvature: bool, damping: bool) -> None:
        self.curvature, self.damping = curvature, damping

    def update(
        self, factors: InverseFreeFactors, statistics: Averages, options: Options, step: int
    ) -> InverseFreeFactors:
        if options["scale_init"]:
            stack = begun(Stack(factors, statistics, {}))
            factors, statistics = stack.factors, stack.statistics
        K, C = factors.K, factors.C
        H_K = update.curvature(K, statistics.input.value)
        H_C = update.curvature(C, statistics.grad.value)
        # the damping of IKFAC is that of each factor by itself
        c_K, c_C = dampings(statistics, {**options, "kfac_like": not self.damping})
        new = replace(factors)
        for name, F, H, other, H_other, c in (
            ("K", K, H_K, C, H_C, c_K),
            ("C", C, H_C, K, H_K, c_C),
        ):
            m = self.term(F, H, other, H_other, c)
            old: StructuredMatrix | None = getattr(factors, f"m_{name}")
            if old is not None:
                m = options["alpha1"] * old + m
                new = replace(new, **{f"m_{name}": m})
            beta: Any = options["lr_cov"]
            if options["factor_clip"] is not None:
                beta = update.clip_lr_cov(beta, m, options["factor_clip"])
            new = replace(new, **{name: update.factor_step(F, m, beta)})
        return new

    def term(
        self,
        K: StructuredMatrix,
        H_K: StructuredMatrix,
        C: StructuredMatrix,
        H_C: StructuredMatrix,
        damping: Any,
    ) -> StructuredMatrix:
        """``1/2 (t H_K + lambda d K^T K - I)``."""
        t = update.mean(H_C) if self.curvature else 1.0
        d = update.mean(C.gram()) if self.damping else 1.0
        return 0.5 * (t * H_K + (damping * d) * K.gram()).add_scaled_identity(-1.0)

    def update_all(
        self, stacks: Iterable[Stack], options: Options, step: int
    ) -> Iterator[InverseFreeFactors]:
        yield from Method.update_all(self, stacks, options, step)


def make(variant: Variant, model: nn.Module, **options: Any) -> KroneckerOptimizer:
    """An optimizer with these terms and the options of SINGD."""
    defaults = SINGD(model, damping=1e-3, burn_in=0).defaults
    defaults = defaults | options | {"alpha1": variant.alpha1}
    method = TraceTerms(variant.curvature, variant.damping)
    return KroneckerOptimizer(model, method, None, defaults, max_skipped=None)


def train(case: Row, steps: dict[str, int], seed: int = 0, **options: Any) -> Outcome:
    def optimizer(model: nn.Module) -> KroneckerOptimizer:
        return make(VARIANTS[case["variant"]], model, T=T, **options)

    scale = float(case.get("scale", 1.0))
    return common.train(case["task"], optimizer, steps=steps[case["task"]], seed=seed, scale=scale)


def stability(out: Path, steps: dict[str, int], seeds: Sequence[int]) -> list[Row]:
    """The paper's bare rule over rates."""
    key = ("task", "scale", "variant", "lr", "lr_cov", "seed", "steps")
    grid = product(TASKS, VARIANTS, RATES, LR_COV, seeds)
    cases = [
        dict(zip(key, map(str, (*task, *given, steps[task[0]])), strict=True))
        for task, *given in grid
    ]

    def measure(case: Row) -> Row:
        numbers = {"lr": float(case["lr"]), "lr_cov": float(case["lr_cov"])}
        options = BARE | numbers | {"damping": DAMPING}
        end = train(case, steps, int(case["seed"]), **options)
        worst = common.condition([*common.factors(end.optimizer, "K")])
        return {"how": end.how, "loss": f"{end.last:.5g}", "condition of K": f"{worst:.3g}"}

    return table(out / "trace_terms.csv", key, cases, measure)


FORMS: dict[str, dict[str, Any]] = {
    "bare": BARE | {"graft": "rms"},
    "bare, damping times the scale squared": BARE | {"graft": "rms"},
    "relative damping, first scale": {
        "structures": ("dense", "dense"),
        "factor_clip": None,
        "graft": "rms",
    },
    "library's default": {"structures": ("dense", "dense"), "graft": "rms"},
}


def scales(out: Path, steps: dict[str, int]) -> list[Row]:
    """The loss times a number; directions have a fixed length, so that only factors differ."""
    key = ("task", "variant", "form", "scale", "steps")
    grid = product([TASKS[0][0]], list(VARIANTS)[:4], FORMS, SCALES)
    cases = [dict(zip(key, map(str, (*given, steps[given[0]])), strict=True)) for given in grid]

    def measure(case: Row) -> Row:
        scale = float(case["scale"])
        damping = DAMPING * (scale**2 if "squared" in case["form"] else 1.0)
        options = FORMS[case["form"]] | {"lr": 3e-3, "lr_cov": 0.03, "damping": damping}
        end = train(case, steps, **options)
        worst = common.condition(common.factors(end.optimizer, "K"))
        return {"how": end.how, "loss": f"{end.last:.5g}", "condition of K": f"{worst:.3g}"}

    return table(out / "trace_terms_scales.csv", key, cases, measure)


def starts() -> str:
    """The largest number that each rule meets at its first update, from the identity."""
    lines = []
    for task, scale in TASKS:
        factors = first_factors(task, scale)
        alone = [max(largest(pair[i]) for pair in factors) for i in (0, 1)]
        both = max(largest(a) * mean(b) for K, C in factors for a, b in ((K, C), (C, K)))
        cells = (f"{x:.2g}" for x in (*alone, both))
        lines.append([f"{task}, loss times {scale:g}", *cells])
    head = ["task", "IKFAC, K", "IKFAC, C", "INGD"]
    limits = ", ".join(f"{1 + 4 / b:.0f} at {b:g}" for b in LR_COV)
    return f"{markdown(head, lines)}\n\nThe bound $1 + 4 / \\beta_1$ is {limits}."


def first_factors(task: str, scale: float) -> list[tuple[Tensor, Tensor]]:
    """``S_K`` and ``S_C`` of every weight, of the first batch."""
    torch.manual_seed(0)
    made = EVERY_TASK[task]
    model = made.model()
    optimizer = KFAC(model, T=1, lr_cov=1.0, damping=1.0)
    (scale * made.loss(model, next(made.batches(0, made.batch)))).backward()
    optimizer.precondition()
    states = [state for state in optimizer.state.values() if "S_K" in state]
    return [(state["S_K"][0].double(), state["S_C"][0].double()) for state in states]


def largest(S: Tensor) -> float:
    return float(torch.linalg.eigvalsh(S)[-1])


def mean(S: Tensor) -> float:
    return float(S.diagonal().mean())


def report(rows: list[Row], scaled: list[Row]) -> list[str]:
    """Shares of failed runs, condition numbers, and what a factor of the loss changes."""
    lines = []
    for (task, scale), variant in product(TASKS, VARIANTS):
        case = (task, str(scale), variant)
        own = [r for r in rows if (r["task"], r["scale"], r["variant"]) == case]
        shares = [share([r for r in own if r["lr_cov"] == str(b)]) for b in LR_COV]
        good = [r for r in own if r["how"] == "good"]
        middle = median(float(r["condition of K"]) for r in good) if good else math.nan
        lowest = min((float(r["loss"]) for r in good), default=math.nan)
        name = f"{task}, loss times {scale:g}: {variant}"
        lines.append(
            [
                name,
                share(own),
                *shares,
                *("" if math.isnan(x) else f"{x:.4g}" for x in (middle, lowest)),
            ]
        )
    head = ["task: terms", "failed", *(f"at lr_cov {b:g}" for b in LR_COV)]
    head += ["median condition of K", "lowest loss"]
    changes = []
    for variant, form in product(list(VARIANTS)[:4], FORMS):
        own = [r for r in scaled if (r["variant"], r["form"]) == (variant, form)]
        if own:
            changes.append([f"{variant}; {form}", *change(own)])
    return [
        starts(),
        markdown(head, lines),
        markdown(
            ["terms; form", "failed", "largest change of the loss", "condition of K"], changes
        ),
    ]


def share(rows: list[Row]) -> str:
    return f"{sum(r['how'] != 'good' for r in rows)} of {len(rows)}"


def change(rows: list[Row]) -> list[str]:
    """Failed runs, the largest relative difference to scale 1, and the range of conditions."""
    one = next(float(r["loss"]) for r in rows if float(r["scale"]) == 1)
    losses = [float(r["loss"]) for r in rows if r["how"] != "nan"]
    most = max((abs(x / one - 1) for x in losses), default=math.nan)
    conditions = [float(r["condition of K"]) for r in rows]
    return [
        share(rows),
        f"{100 * most:.2g} %" if losses and math.isfinite(one) else "",
        f"{min(conditions):.2g} to {max(conditions):.2g}",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of every run; for tests")
    parser.add_argument("--out", type=Path, default=common.OUT)
    given = parser.parse_args(arguments)
    steps = dict.fromkeys(STEPS, given.steps) if given.steps else STEPS
    rows = stability(given.out, steps, given.seeds)
    common.write("trace_terms", report(rows, scales(given.out, steps)), given.out)


if __name__ == "__main__":
    main()
