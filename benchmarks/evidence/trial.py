"""One run of one method on one task."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.evidence import protocol
from benchmarks.evidence.methods import METHODS
from benchmarks.evidence.tasks import TASKS, Half, judge
from benchmarks.optimizers import state_tensors
from benchmarks.peak import PeakBytes
from benchmarks.suite.task import Batch, Task


@dataclass(frozen=True)
class Trial:
    """What is run; ``stage`` is ``"search"``, ``"final"`` or ``"bytes"``."""

    task: str
    method: str
    stage: str
    setting: dict[str, float]
    seed: int
    steps: int

    @property
    def key(self) -> tuple[Any, ...]:
        names = (self.task, self.method, self.stage, self.seed, self.steps)
        return (*names, *sorted(self.setting.items()))


class TrialError(Exception):
    """The loss is not finite, or the method gave up."""


@contextmanager
def failures() -> Iterator[None]:
    """Errors that are a method's failure."""
    try:
        yield
    except (FloatingPointError, torch.linalg.LinAlgError) as error:
        raise TrialError from error


class Training:
    """A model and its optimizer, which take one step at a time."""

    def __init__(self, trial: Trial) -> None:
        torch.manual_seed(trial.seed)
        self.trial, self.task = trial, TASKS[trial.task]
        self.model: nn.Module = self.task.model()
        self.optimizer = METHODS[trial.method](self.model, trial.setting)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.data = self.task.batches(trial.seed, self.task.batch)
        self.done, self.seconds = 0, 0.0

    def step(self) -> None:
        """One training step, at the rate that the schedule says."""
        given = self.trial
        factor = protocol.factor(self.done, given.steps, given.setting["warmup"])
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        batch = next(self.data)
        started = time.process_time()
        loss = descend(self.task, self.model, self.optimizer, batch)
        self.seconds += time.process_time() - started
        self.done += 1
        if not math.isfinite(loss):
            raise TrialError


def descend(task: Task, model: nn.Module, optimizer: Any, batch: Batch) -> float:
    """The loss before the step."""
    optimizer.zero_grad()
    loss = task.loss(model, batch)
    loss.backward()
    optimizer.step()
    return loss.item()


def run(trial: Trial) -> dict[str, Any]:
    """What the run gave: losses before training and at the checks, seconds, and bytes."""
    if trial.stage == "bytes":
        return count_bytes(trial)
    half: Half = "validation" if trial.stage == "search" else "test"
    checks = 1 if trial.stage == "search" else protocol.CHECKS
    due = sorted({max(trial.steps * (k + 1) // checks, 1) for k in range(checks)})
    training = Training(trial)
    losses = [judge(training.task, training.model, half)]
    seconds: list[float] = []
    try:
        with failures():
            while training.done < trial.steps:
                training.step()
                if training.done in due:
                    losses.append(judge(training.task, training.model, half))
                    seconds.append(round(training.seconds, 4))
    except TrialError:
        losses.append(math.nan)
    state = sum(t.nbytes for t in state_tensors(training.optimizer))
    failed = not losses[-1] < losses[0]
    digits = [None if math.isnan(x) else float(f"{x:.6g}") for x in losses]
    found = {"losses": digits, "checks": [0, *due], "seconds": seconds or [training.seconds]}
    return {**found, "state": state, "failed": failed}


def count_bytes(trial: Trial) -> dict[str, Any]:
    """The most bytes alive at once, weights and batch included, in steps with two updates."""
    with PeakBytes() as meter:
        training = Training(trial)
        try:
            with failures():
                for _ in range(trial.steps):
                    training.step()
        except TrialError:
            return {"failed": True}
    return {"peak": meter.peak, "failed": False}
