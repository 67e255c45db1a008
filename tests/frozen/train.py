"""Ways to train a few steps: :data:`WAYS`."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.frozen.cases import Case
from tests.frozen.nets import OUT, batch, make

STEPS = 4


class Run:
    """One configuration in training; ``rank`` takes every ``case.ranks``-th sample."""

    def __init__(self, case: Case, rank: int = 0) -> None:
        self.case, self.rank = case, rank
        self.model = make(case.net, case.dtype)
        self.start = copy.deepcopy(self.model)
        self.called = self.wrapped(self.model)
        self.scale = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=case.way == "scaled")
        self.optimizer = self.made(self.called)

    def wrapped(self, model: nn.Module) -> nn.Module:
        """What is called."""
        return DistributedDataParallel(model) if self.case.way == "wrapped" else model

    def spoil(self, gradient: Tensor) -> None:
        """Make one number infinite."""
        gradient.view(-1)[0] = float("inf")

    def made(self, model: nn.Module, params: Any = None) -> Any:
        return self.case.method(model, params, **{"lr": 0.05, "T": 2, **self.case.options})

    def data(self, step: int) -> tuple[Tensor, Tensor]:
        X, y = batch(self.case.net, step, next(self.model.parameters()).dtype)
        return X[self.rank :: self.case.ranks], y[self.rank :: self.case.ranks]

    def output(self, X: Tensor) -> Tensor:
        with torch.autocast("cpu", self.case.autocast, enabled=self.case.autocast is not None):
            return self.called(X)

    def backward(self, X: Tensor, y: Tensor, parts: int = 1) -> Tensor:
        """The gradient of a mean over the batch, of which this is one part."""
        error = self.output(X).to(y.dtype) - y
        loss = error.square().sum() * (0.5 / (len(X) * parts))
        self.scale.scale(loss).backward()
        return loss

    def step(self, step: int) -> None:
        self.optimizer.zero_grad()
        self.backward(*self.data(step))
        self.scale.step(self.optimizer)
        self.scale.update()


def plain(run: Run) -> None:
    for step in range(STEPS):
        run.step(step)


def micro(run: Run) -> None:
    for step in range(STEPS):
        run.optimizer.zero_grad()
        X, y = run.data(step)
        for part in range(3):
            run.backward(X[part::3], y[part::3], parts=3)
        run.optimizer.step()


def bad_gradients(run: Run) -> None:
    for step in range(STEPS + 1):
        run.optimizer.zero_grad()
        run.backward(*run.data(step))
        if step == 1:
            run.spoil(next(run.model.parameters()).grad)
        run.optimizer.step()
    assert run.optimizer.skipped == 1


def bad_inputs(run: Run) -> None:
    for step in range(STEPS + 2):
        run.optimizer.zero_grad()
        X, y = run.data(step)
        if step in (0, 3) and run.rank == 0:
            X[0] = float("nan")
        run.backward(X, y)
        run.optimizer.step()
    assert run.optimizer.skipped == 2


def curvature(run: Run) -> None:
    for step in range(STEPS):
        run.optimizer.zero_grad()
        X, y = run.data(step)
        with run.optimizer.curvature():
            run.backward(X, run.output(X).detach() + 0.5 * y)
        run.backward(X, y)
        run.optimizer.step()


def precondition(run: Run) -> None:
    sgd = torch.optim.SGD(run.model.parameters(), lr=0.1, momentum=0.5)
    for step in range(STEPS):
        run.optimizer.zero_grad()
        run.backward(*run.data(step))
        run.optimizer.precondition()
        sgd.step()


def counted(run: Run) -> None:
    for step in range(STEPS):
        run.optimizer.zero_grad()
        X, y = run.data(step)
        for rows in (slice(0, 7 - step), slice(7, None)):
            error = run.output(X[rows]) - y[rows]
            (error.square().sum() / (OUT * len(X))).backward()
            run.optimizer.count_terms(OUT * len(X[rows]))
        run.optimizer.step()


def resumed(run: Run) -> None:
    for step in range(STEPS + 1):
        run.step(step)
        if step in (1, 2):  # after an update of the factors, and before one
            file = io.BytesIO()
            torch.save((run.model.state_dict(), run.optimizer.state_dict()), file)
            file.seek(0)
            weights, state = torch.load(file)
            start, new = run.start, type(run)(run.case, run.rank)
            new.model.load_state_dict(weights)
            new.optimizer.load_state_dict(state)
            vars(run).update(vars(new) | {"start": start})


def two_groups(run: Run) -> None:
    run.optimizer.close()
    first, *others = run.model.children()
    options = {"T": 1, "weight_decay": 0.1, "structures": ("diagonal", "lower_triangular")}
    rest = [p for module in others for p in module.parameters()]
    groups = [{"params": first.parameters(), "lr": 0.02, **options}, {"params": rest}]
    run.optimizer = run.made(run.model, groups)
    plain(run)


def added_group(run: Run) -> None:
    run.optimizer.close()
    first, *others = run.model.children()
    run.optimizer = run.made(run.model, list(first.parameters()))
    run.step(0)
    rest = [p for module in others for p in module.parameters()]
    run.optimizer.add_param_group({"params": rest, "lr": 0.02, "damping": 0.1})
    plain(run)


def closure(run: Run) -> None:
    for step in range(STEPS):

        def evaluate(step: int = step) -> Tensor:
            run.optimizer.zero_grad()
            return run.backward(*run.data(step))

        run.optimizer.step(evaluate)


def paused(run: Run) -> None:
    for step in range(STEPS):
        run.optimizer.zero_grad()
        with run.optimizer.paused():
            run.backward(*run.data(step + STEPS), parts=2)
        run.backward(*run.data(step), parts=2)
        run.optimizer.step()


def schedule(run: Run) -> None:
    scheduler = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.5)
    for step in range(STEPS):
        run.step(step)
        scheduler.step()


def moved(run: Run) -> None:
    run.step(0)
    run.model.float()
    plain(run)


def new_structures(run: Run) -> None:
    plain(run)
    run.optimizer.param_groups[0]["structures"] = ("lower_triangular", "diagonal")
    plain(run)


def frozen_layer(run: Run) -> None:
    run.step(0)
    next(run.model.children()).requires_grad_(False)
    plain(run)


WAYS: dict[str, Callable[[Run], None]] = {
    "plain": plain,
    "wrapped": plain,
    "scaled": plain,
    "micro": micro,
    "bad gradients": bad_gradients,
    "bad inputs": bad_inputs,
    "curvature": curvature,
    "precondition": precondition,
    "counted": counted,
    "resumed": resumed,
    "two groups": two_groups,
    "added group": added_group,
    "closure": closure,
    "paused": paused,
    "schedule": schedule,
    "moved to float32": moved,
    "new structures": new_structures,
    "frozen layer": frozen_layer,
}
