"""Runs of a claim: bare optimizers on tasks of the comparison, and a table that is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.evidence.tasks import TASKS
from benchmarks.results import RESULTS, Row, keep, read
from benchmarks.suite.task import Batch

OUT = RESULTS / "claims"

BARE: dict[str, Any] = {
    "graft": None,
    "factor_clip": None,
    "relative_damping": False,
    "scale_init": False,
    "burn_in": 0,
    "damping": 1e-3,
    "decoupled_weight_decay": False,
    "structures": ("dense", "dense"),
}
"""The rule of the paper, without what :class:`singd.SINGD` adds."""


class Outcome(NamedTuple):
    """How a run ended: ``"good"``, ``"diverged"`` (no lower than at first) or ``"nan"``."""

    how: str
    first: float
    last: float
    model: nn.Module
    optimizer: Any


def train(
    task: str,
    make: Callable[[nn.Module], Any],
    *,
    steps: int,
    seed: int = 0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    each_step: Callable[[int, nn.Module, Any], None] | None = None,
) -> Outcome:
    """Train with ``scale`` times the loss; losses are those of the test, in float32 at least."""
    torch.manual_seed(seed)
    made = TASKS[task]
    model = made.model().to(dtype)
    optimizer = make(model)
    first = test_loss(task, model)
    for step, batch in zip(range(steps), made.batches(seed, made.batch), strict=False):
        optimizer.zero_grad()
        loss = scale * made.loss(model, cast(batch, dtype)).float()
        loss.backward()
        try:
            optimizer.step()
        except (FloatingPointError, torch.linalg.LinAlgError):
            return Outcome("nan", first, math.nan, model, optimizer)
        if not math.isfinite(loss.item()):
            return Outcome("nan", first, math.nan, model, optimizer)
        if each_step is not None:
            each_step(step, model, optimizer)
    last = test_loss(task, model)
    if not math.isfinite(last):
        return Outcome("nan", first, math.nan, model, optimizer)
    return Outcome("good" if last < first else "diverged", first, last, model, optimizer)


def test_loss(task: str, model: nn.Module) -> float:
    """The task's test loss, with a copy of the weights in float32 where they are in less."""
    made, weights = TASKS[task], {k: v.float() for k, v in model.state_dict().items()}
    judged = made.model()
    judged.load_state_dict(weights)
    return made.test_loss(judged)


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in batch)


def table(
    path: Path, key: Sequence[str], cases: Iterable[Row], measure: Callable[[Row], Row]
) -> list[Row]:
    """A row for each case, which are named by ``key``; those in the file are not measured again."""
    torch.set_num_threads(1)
    done = {tuple(row[k] for k in key): row for row in read(path)}
    wanted = list(cases)
    for case in tqdm(wanted, path.stem, mininterval=2.0):
        name = tuple(case[k] for k in key)
        if name not in done:
            done[name] = case | measure(case)
            keep(path, [done[name]], key)
    return [done[tuple(case[k] for k in key)] for case in wanted]


def factors(optimizer: Any, name: str) -> list[Tensor]:
    """The dense factors of that name, in float64."""
    found = [state[name] for state in optimizer.state.values() if name in state]
    return [t.double() for tensors in found for t in tensors]


def condition(matrices: Iterable[Tensor]) -> float:
    """The largest condition number."""
    worst = 1.0
    for matrix in matrices:
        if not matrix.isfinite().all():
            return math.inf
        singular = torch.linalg.svdvals(matrix)
        worst = max(worst, float((singular[..., 0] / singular[..., -1]).max()))
    return worst


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; all columns but the first are numbers."""
    lines = [f"| {' | '.join(head)} |", f"| --- |{' --: |' * (len(head) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def write(name: str, parts: Iterable[str], out: Path = OUT) -> None:
    """The tables of a claim, which its page includes."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text("\n\n".join(parts) + "\n")
