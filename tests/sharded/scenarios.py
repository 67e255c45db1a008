"""What happens while models are trained, on ranks and in one process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint

from singd import KFAC, SINGD
from singd.ops.dtensor import local
from tests.sharded.layouts import NAMES, Context, Layout
from tests.sharded.setting import OPTIONS, Setting, data, net
from tests.sharded.world import snapshot

Ends = dict[str, Tensor]


def plain(setting: Setting, **shares: Any) -> Ends:
    """Uneven shares of every batch."""
    model = setting.shard(net())
    optimizer = SINGD(model, **OPTIONS)
    for X, y in data():
        optimizer.zero_grad()
        setting.backward(model, X, y, **shares)
        optimizer.step()
    return snapshot(model, optimizer)


def without_rows(setting: Setting) -> Ends:
    """The last rank never has a sample."""
    return plain(setting, empty=True)


def kfac(setting: Setting) -> Ends:
    model = setting.shard(net())
    names = ("lr", "momentum", "damping", "weight_decay", "T", "lr_cov", "loss_average", "kl_clip")
    optimizer = KFAC(model, **{name: OPTIONS[name] for name in names})
    for X, y in data():
        optimizer.zero_grad()
        setting.backward(model, X, y)
        optimizer.step()
    return snapshot(model, optimizer)


def without_synchronisation(setting: Setting) -> Ends:
    """Three backward passes a step, of which the last one reduces all gradients."""
    model = setting.shard(net())
    optimizer = SINGD(model, **OPTIONS)
    for X, y in data():
        optimizer.zero_grad()
        for share in setting.shares():
            for part in range(3):
                setting.synchronise(model, part == 2)
                rows = slice(share.start + part, share.stop, 3)
                setting.loss(model(X[rows]), y[rows]).backward()
        optimizer.step()
    return snapshot(model, optimizer)


def dropped_passes(setting: Setting, drop: Callable[[Any, Any], None]) -> Ends:
    """Every second backward pass is dropped before the step."""
    model = setting.shard(net())
    optimizer = SINGD(model, **OPTIONS)
    for (X, y), (other, z) in zip(data(), data()[::-1], strict=True):
        setting.backward(model, 3 * other, z)
        drop(model, optimizer)
        setting.backward(model, X, y)
        optimizer.step()
        optimizer.zero_grad()
    return snapshot(model, optimizer)


def reset_between(setting: Setting) -> Ends:
    """Gradients that are not reduced yet outlive ``zero_grad``, and so do their statistics."""
    model = setting.shard(net())
    optimizer = SINGD(model, **OPTIONS)
    for X, y in data():
        setting.synchronise(model, False)
        setting.backward(model, X, y)
        if setting.layout is not None:
            optimizer.zero_grad()
        setting.synchronise(model, True)
        setting.backward(model, -2 * X, y)
        optimizer.step()
        optimizer.zero_grad()
    return snapshot(model, optimizer)


def evaluation(setting: Setting, **options: Any) -> Ends:
    """Passes without gradients between the backward pass and the step, and after it."""
    model = setting.shard(net(), **options)
    optimizer = SINGD(model, **OPTIONS)
    for X, y in data():
        optimizer.zero_grad()
        setting.backward(model, X, y)
        with torch.no_grad():
            model(X)
        optimizer.step()
        model.eval()
        with torch.no_grad():
            model(X)
        optimizer.plan()
        model.train()
    return snapshot(model, optimizer)


def ignored(setting: Setting) -> Ends:
    """Parameters that :func:`fully_shard` leaves alone are whole on every rank."""
    model = net()
    kept = {model[3].weight, model[1].norm.weight}
    setting.shard(model, **({} if setting.layout is None else {"ignored_params": kept}))
    optimizer = SINGD(model, **OPTIONS)
    for X, y in data():
        optimizer.zero_grad()
        setting.backward(model, X, y)
        optimizer.step()
    return snapshot(model, optimizer)


def checkpointed(setting: Setting, use_reentrant: bool) -> Ends:
    """Activation checkpointing within the groups of parameters."""
    model = net()
    for block in model[1:3]:
        run = functools.partial(checkpoint, block.forward, use_reentrant=use_reentrant)
        block.forward = run
    setting.shard(model)
    optimizer = SINGD(model, **OPTIONS)
    for X, y in data():
        optimizer.zero_grad()
        setting.backward(model, X, y)
        optimizer.step()
    return snapshot(model, optimizer)


def not_finite(setting: Setting, spoil: Callable[[Setting, Any, Tensor], None]) -> Ends:
    """One rank has a number that is not finite at the second step: all skip it."""
    model = setting.shard(net())
    optimizer = SINGD(model, **OPTIONS)
    for step, (X, y) in enumerate(data()):
        optimizer.zero_grad()
        X = X.clone()
        if step == 1 and setting.is_first:
            X[0] = float("nan") if spoil is of_input else X[0]
        setting.backward(model, X, y)
        if step == 1 and setting.is_first:
            spoil(setting, model, X)
        optimizer.step()
        assert optimizer.skipped == (step > 0)
    return snapshot(model, optimizer)


def of_input(setting: Setting, model: Any, X: Tensor) -> None:
    """The input was not finite."""


def of_gradient(setting: Setting, model: Any, X: Tensor) -> None:
    """A number in the first rank's part of a gradient."""
    local(model[0].weight.grad).view(-1)[0] = float("inf")


def of_norm(setting: Setting, model: Any, X: Tensor) -> None:
    """A gradient that AdamW takes."""
    local(model[1].norm.bias.grad).view(-1)[0] = float("nan")


def clipped(setting: Setting) -> Ends:
    """Gradients are clipped by PyTorch, as DTensors."""
    model = setting.shard(net())
    optimizer = SINGD(model, **OPTIONS | {"kl_clip": None, "lr": 0.02})
    for X, y in data():
        optimizer.zero_grad()
        setting.backward(model, X, y)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    return snapshot(model, optimizer)


def scaled(setting: Setting) -> Ends:
    """A GradScaler that meets an overflow on one rank."""
    model = setting.shard(net())
    optimizer = SINGD(model, **OPTIONS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step, (X, y) in enumerate(data()):
        optimizer.zero_grad()
        for share in setting.shares():
            loss = setting.loss(model(X[share]), y[share])
            scaler.scale(loss).backward()
        if step == 2 and setting.is_first:
            local(model[0].weight.grad).view(-1)[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**7
    return snapshot(model, optimizer)


def grafted(setting: Setting, graft: str) -> Ends:
    """Norms of other steps, and the numbers that ``telemetry`` is given."""
    told: list[dict[str, Any]] = []
    model = setting.shard(net())
    options = OPTIONS | {"graft": graft, "telemetry": told.append}
    optimizer = SINGD(model, layers="all", **options)
    for X, y in data():
        optimizer.zero_grad()
        setting.backward(model, X, y)
        optimizer.step()
    numbers = {
        f"{step} {name} {key}": torch.as_tensor(value)
        for step, report in enumerate(told)
        for name, entry in report.items()
        for key, value in (entry if isinstance(entry, dict) else {"": entry}).items()
    }
    return snapshot(model, optimizer) | numbers


def counted(setting: Setting) -> Ends:
    """Ranks say how many terms their loss has."""
    model = setting.shard(net())
    optimizer = SINGD(model, **OPTIONS | {"loss_average": None})
    for X, y in data():
        optimizer.zero_grad()
        for share in setting.shares():
            setting.loss(model(X[share]), y[share]).backward()
            optimizer.count_terms(share.stop - share.start)
        optimizer.step()
    return snapshot(model, optimizer)


def compiled(setting: Setting) -> Ends:
    """Every block is compiled, then sharded."""
    model = net()
    for block in model[1:3]:
        block.compile(backend="eager")
    setting.shard(model)
    optimizer = SINGD(model, **OPTIONS)
    for X, y in data():
        optimizer.zero_grad()
        setting.backward(model, X, y)
        optimizer.step()
    torch._dynamo.reset()
    return snapshot(model, optimizer)


def mixed(setting: Setting) -> Ends:
    """Passes in bfloat16, everything else in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model: Any = setting.shard_low(net().float(), policy)
    optimizer = SINGD(model, **OPTIONS)
    for X, y in data():
        optimizer.zero_grad()
        shares = setting.shares()
        for share in shares:
            model.set_requires_gradient_sync(share is shares[-1])
            setting.loss(model(X[share].float()), y[share]).backward()
        optimizer.step()
    return snapshot(model, optimizer)


def rounded(setting: Setting, **options: Any) -> Ends:
    """Weights in bfloat16, rounded stochastically, of ranks that all have the same samples.

    Sums over ranks are exact then, and everything else is the arithmetic of one process.
    """
    model = setting.shard(net().bfloat16())
    low = {"preconditioner_dtype": (torch.bfloat16, torch.float32), "kl_clip": None, "lr": 0.02}
    optimizer = SINGD(model, **OPTIONS | low | options)
    for X, y in data():
        optimizer.zero_grad()
        loss = 0.5 * (model(X.bfloat16()).float() - y.float()).square().sum() / len(X)
        loss.backward()
        optimizer.step()
    return snapshot(model, optimizer)


class Functional(nn.Module):
    """A layer that is never called: its weight is used."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.used = net(), nn.Linear(3, 3, bias=False, dtype=torch.float64)
        nn.init.eye_(self.used.weight)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.body(x), self.used.weight)


def functional(setting: Setting) -> Ends:
    """A weight that no hook sees is left to AdamW."""
    model = Functional()
    if setting.layout is not None:
        Layout(setting.layout.mesh, leaves=False).shard(model)
    optimizer = SINGD(model, **OPTIONS)
    for X, y in data():
        optimizer.zero_grad()
        setting.backward(model, X, y)
        optimizer.step()
    assert "exp_avg" in optimizer.state[model.used.weight]
    return snapshot(model, optimizer)


DROPS: dict[str, Callable[[Any, Any], None]] = {
    "by the optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "by the model": lambda model, optimizer: model.zero_grad(),
}
#: By how much scenarios differ from one process, where it is not rounding in float64.
TOLERANCES: dict[str, float] = {"mixed precision": 1e-5, "bfloat16": 0.0}

SCENARIOS: dict[str, Callable[[Setting], Ends]] = (
    {
        "uneven shares": plain,
        "KFAC": kfac,
        "a rank without rows": without_rows,
        "passes without synchronisation": without_synchronisation,
        "gradients are reset before they are reduced": reset_between,
        "evaluation": evaluation,
        "evaluation, whole after the forward pass": functools.partial(
            evaluation, reshard_after_forward=False
        ),
        "ignored parameters": ignored,
        "clipped": clipped,
        "scaled": scaled,
        "counted terms": counted,
        "compiled": compiled,
        "never called": functional,
        "mixed precision": mixed,
        "bfloat16": rounded,
    }
    | {
        f"dropped {name}": functools.partial(dropped_passes, drop=drop)
        for name, drop in DROPS.items()
    }
    | {
        f"checkpointed, {reentrant}": functools.partial(checkpointed, use_reentrant=reentrant)
        for reentrant in (False, True)
    }
    | {
        f"not finite: {spoil.__name__}": functools.partial(not_finite, spoil=spoil)
        for spoil in (of_input, of_gradient, of_norm)
    }
    | {f"grafted to {graft}": functools.partial(grafted, graft=graft) for graft in ("sgd", "adamw")}
)


def sharded(context: Context, layout: str, name: str) -> Ends:
    """A scenario on the ranks of a layout."""
    used = context.layouts[layout]
    return SCENARIOS[name](Setting(used, used.ranks))


def alone(layout: str, name: str) -> Ends:
    """The same in one process."""
    return SCENARIOS[name](Setting(None, 2 if layout == "2 ranks" else 4))


def cases() -> dict[str, Any]:
    """Every scenario in two layouts."""
    return {
        f"{name}: {layout}": (sharded, layout, name)
        for number, name in enumerate(SCENARIOS)
        for layout in (NAMES[number % 4], NAMES[(number + 3) % 4])
    }
