"""The sweep behind the defaults: many settings, judged on digits that are not the test digits.

    python -m benchmarks.sweep rule    # one of STAGES; adds to benchmarks/out/sweep.csv

Besides the bound that :class:`singd.SINGD` has, it tries others, as a :class:`Bounded` subclass.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from tqdm import tqdm

from benchmarks.training import train
from singd import KFAC, SINGD, update
from singd.grouping import Members
from singd.options import Group
from structured import StructuredMatrix

OUT = Path("benchmarks/out/sweep.csv")
SETTINGS = (
    *("stage", "model", "precision", "steps", "seed", "method", "bound", "kappa", "lr", "lr_cov"),
    *("T", "damping", "alpha1", "factors", "kfac_like", "structures"),
)
RESULTS = ("loss", "accuracy", "worst")
SHORT, LONG = 186, 620  # three and ten epochs of the demo

Settings = dict[str, Any]


class Bounded(SINGD):
    """SINGD with one of several bounds of the weights' step, and of the factors' step.

    Args:
        bound: Of the weights' step: "none"; "kl", of all layers together; "kl layer", of each;
            "graft" and "graft adam", the norm of the gradient's or of Adam's step per layer.
        kappa: Value of the bound.
        factors: Of the factors' step: "none"; "max" entry, as ``normalize_lr_cov``;
            ``||lr_cov m|| <= 1/2`` in the "frobenius" norm, or in the "spectral" norm, as
            ``factor_clip`` bounds it.
    """

    def __init__(
        self, model: nn.Module, bound: str, kappa: float, factors: str, **options: Any
    ) -> None:
        self.bound, self.kappa, self.factors = bound, kappa, factors
        self.squares: dict[torch.Size, Tensor] = {}
        super().__init__(
            model,
            kl_clip=kappa if bound == "kl" else None,
            normalize_lr_cov=factors == "max",
            factor_clip=0.5 if factors == "spectral" else None,
            **options,
        )

    def _precondition(self, members: Members, products: Members, G: Tensor) -> Tensor:
        N = super()._precondition(members, products, G)
        return (N * self._scale(N.float(), G.float())).to(G.dtype)

    def _scale(self, N: Tensor, G: Tensor) -> Tensor | float:
        """What multiplies the natural gradients ``N`` of layers of equal shape."""
        tiny = torch.finfo(torch.float32).tiny
        norm = N.norm(dim=(-2, -1), keepdim=True).clamp(min=tiny)
        if self.bound == "kl layer":
            inner = (N * G).sum((-2, -1), keepdim=True).clamp(min=tiny)
            return (self.kappa / inner).sqrt().div(self.defaults["lr"]).clamp(max=1)
        if self.bound == "graft":
            return G.norm(dim=(-2, -1), keepdim=True) / norm
        if self.bound == "graft adam":
            square = self.squares.setdefault(G.shape, G.square())
            square.lerp_(G.square(), 0.01)
            return (G / square.sqrt().add(1e-8)).norm(dim=(-2, -1), keepdim=True) / norm
        return 1.0

    def _move_factor(
        self,
        group: Group,
        side: str,
        K: StructuredMatrix,
        m_K: StructuredMatrix,
        old: StructuredMatrix | None,
    ) -> Members:
        if self.factors != "frobenius":
            return super()._move_factor(group, side, K, m_K, old)
        new: Members = {}
        if old is not None:
            m_K = new[f"m_{side}"] = group["alpha1"] * old.to(m_K.dtype) + m_K
        lr_cov = (0.5 / m_K.frobenius_norm()).clamp(max=group["lr_cov"])
        new[side] = update.factor_step(K, m_K, lr_cov)
        return new


def make(method: str, bound: str, kappa: float, **options: Any) -> Any:
    if method == "SGD":
        return lambda model: SGD(model.parameters(), lr=options["lr"], momentum=0.9)
    if method == "AdamW":
        return lambda model: AdamW(model.parameters(), lr=options["lr"])
    if method == "KFAC":
        return lambda model: KFAC(model, kl_clip=kappa if bound == "kl" else None, **options)
    return lambda model: Bounded(model, bound, kappa, **options)


def run(settings: Settings) -> Settings:
    """One row of the table."""
    options = dict(settings)
    where = {key: options.pop(key) for key in ("model", "precision", "steps", "seed")}
    stage = options.pop("stage")
    if "structures" in options:
        options["structures"] = (options["structures"],) * 2
    model = where.pop("model")
    try:
        history = train(model, make(**options), split="sweep", **where)
    except (FloatingPointError, torch.linalg.LinAlgError):
        return {**settings, "loss": "nan", "accuracy": "nan", "worst": "nan"}
    losses = torch.tensor(history.losses)
    return {
        **settings,
        "stage": stage,
        "loss": f"{losses[-20:].mean():.4f}",
        "accuracy": f"{history.accuracy:.3f}",
        "worst": f"{losses[len(losses) // 2 :].max():.3f}",  # late instability shows here
    }


def grid(**axes: Any) -> Iterator[Settings]:
    """All combinations of the axes given as lists; other values are kept."""
    lists = {k: v if isinstance(v, list) else [v] for k, v in axes.items()}
    for values in itertools.product(*lists.values()):
        yield dict(zip(lists, values, strict=True))


BASE: Settings = {
    "method": "SINGD",
    "model": ["CNN", "ViT"],
    "precision": "fp32",
    "steps": SHORT,
    "seed": 0,
    "bound": "kl",
    "kappa": 1e-3,
    "lr": 0.1,
    "lr_cov": 0.1,
    "T": 1,
    "damping": 1e-3,
    "alpha1": 0.5,
    "factors": "none",
    "kfac_like": False,
    "structures": "dense",
}


def baselines(**axes: Any) -> Iterator[Settings]:
    shared = {k: BASE[k] for k in ("model", "precision", "steps", "seed")}
    for method, lrs in {"SGD": [0.01, 0.03, 0.1, 0.3], "AdamW": [1e-3, 3e-3, 1e-2]}.items():
        own = {"method": method, "bound": "", "kappa": 0, "lr": lrs}
        yield from grid(**{**shared, **own, **axes})


def rule() -> Iterator[Settings]:
    """Which bound, over learning rates and speeds of the factors."""
    yield from baselines()
    speeds = [(1, 0.03), (10, 0.1)]
    rules = [
        ("none", [0], [0.003, 0.03]),
        ("kl", [1e-5, 1e-4, 1e-3], [0.03, 0.3]),
        ("kl layer", [1e-5, 1e-4], [0.1]),
        ("graft", [0], [0.01, 0.1]),
        ("graft adam", [0], [0.0003, 0.001]),
    ]
    for (T, lr_cov), (bound, kappas, lrs) in itertools.product(speeds, rules):
        own = {"bound": bound, "kappa": kappas, "lr": lrs, "T": T, "lr_cov": lr_cov}
        yield from grid(**{**BASE, **own})


def factors() -> Iterator[Settings]:
    """Bounds of the factors' step, so that they may move fast."""
    speeds = [(1, 0.1), (1, 0.3), (10, 0.1), (10, 0.3), (10, 1.0)]
    for T, lr_cov in speeds:
        own = {"T": T, "lr_cov": lr_cov, "kappa": 3e-5, "alpha1": [0.0, 0.5]}
        yield from grid(**{**BASE, **own, "factors": ["none", "max", "frobenius", "spectral"]})


CHOSEN: Settings = {
    **BASE,
    "kappa": 3e-5,
    "T": 10,
    "lr_cov": 0.3,
    "alpha1": 0.0,
    "factors": "spectral",
}


def late() -> Iterator[Settings]:
    """Ten epochs, where the curvature has shrunk and K has grown; both precisions."""
    both = {"precision": ["fp32", "bf16"], "steps": LONG}
    fair = [("SGD", 0.1), ("AdamW", 1e-3), ("AdamW", 1e-2)]
    yield from (b for b in baselines(**both) if (b["method"], b["lr"]) in fair)
    variants: list[Settings] = [
        {},
        {"T": 1, "lr_cov": 0.1},
        {"T": [2, 5]},
        {"kappa": 1e-5},
        {"damping": 1e-2},
        {"bound": "kl layer", "kappa": 3e-6},
    ]
    for variant in variants:
        yield from grid(**{**CHOSEN, **both, **variant})


def around() -> Iterator[Settings]:
    """One option after another, from the settings chosen."""
    variants: list[Settings] = [
        {"seed": [0, 1]},
        {"lr": [0.01, 0.03, 0.3, 1.0]},
        {"damping": [1e-4, 1e-2]},
        {"alpha1": [0.5, 0.9]},
        {"lr_cov": [0.01, 0.03, 0.1, 1.0]},
        {"T": [1, 5]},
        {"factors": "frobenius"},
        {"kappa": [1e-6, 1e-5, 1e-4, 1e-3]},
        {"kfac_like": True, "kappa": [1e-5, 3e-5, 1e-4]},
    ]
    yield from baselines(seed=1)
    for variant in variants:
        yield from grid(**{**CHOSEN, **variant})


def pace() -> Iterator[Settings]:
    """How often the factors move, with and without their momentum, for three structures."""
    own = {"seed": [1, 2], "T": [2, 5, 10], "alpha1": [0.0, 0.5]}
    yield from grid(**{**CHOSEN, **own, "structures": ["dense", "diagonal", "hierarchical(8, 8)"]})


def kfac() -> Iterator[Settings]:
    """KFAC, over the bound and the weight of new statistics."""
    keys = ("model", "precision", "steps", "seed", "bound", "lr", "damping")
    own = {"method": "KFAC", "T": 10, "lr_cov": [0.05, 0.3], "kappa": [1e-5, 3e-5, 1e-4]}
    yield from grid(**{**{k: CHOSEN[k] for k in keys}, **own})


def tune() -> Iterator[Settings]:
    """The one number of every method of the demonstration: three values each."""
    seeds = {"seed": [1, 2]}
    for method, lrs in {"SGD": [0.03, 0.1, 0.3], "AdamW": [1e-3, 3e-3, 1e-2]}.items():
        yield from (b for b in baselines(**seeds, lr=lrs) if b["method"] == method)
    own = {**CHOSEN, **seeds, "kappa": [1e-5, 3e-5, 1e-4]}
    yield from grid(**{**own, "kfac_like": True})
    specs = ["dense", "diagonal", "block_diagonal(16)", "hierarchical(8, 8)", "lower_toeplitz"]
    yield from grid(**{**own, "structures": specs})
    keys = ("model", "precision", "steps", "seed", "bound", "lr", "lr_cov", "T", "damping", "kappa")
    yield from grid(**{"method": "KFAC", **{k: own[k] for k in keys}})


STAGES = {f.__name__: f for f in (rule, factors, late, around, pace, kfac, tune)}


def key(row: Settings) -> tuple[str, ...]:
    """What tells one run from another, as read back from the file."""
    return tuple(str(row.get(name, "")) for name in SETTINGS)


def run_all(todo: Iterable[Settings], workers: int) -> Iterator[Settings]:
    pool = ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
    with pool:
        futures = [pool.submit(run, settings) for settings in todo]
        for future in tqdm(as_completed(futures), total=len(futures), unit="run"):
            yield future.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a+", newline="") as file:
        file.seek(0)
        done = {key(row) for row in csv.DictReader(file)}
        writer = csv.DictWriter(file, [*SETTINGS, *RESULTS])
        if not done:
            writer.writeheader()
        todo = [{"stage": args.stage, **settings} for settings in STAGES[args.stage]()]
        for row in run_all([t for t in todo if key(t) not in done], args.workers):
            writer.writerow(row)
            file.flush()


if __name__ == "__main__":
    main()
