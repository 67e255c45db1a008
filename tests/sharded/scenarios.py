"""What happens while models are trained, on ranks and in one process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint

from singd import SINGD
from singd.ops.dtensor import local
from singd.state.plan import nbytes
from singd.testing.sharded.rows import evaluation, snapshot
from singd.testing.sharded.setting import Ends, Layout, Setting, batches, net
from tests.sharded.layouts import NAMES, Context

OPTIONS: dict[str, Any] = {
    "lr": 0.05,
    "momentum": 0.9,
    "damping": 1e-3,
    "weight_decay": 0.01,
    "T": 2,
    "burn_in": 0,
    "lr_cov": 0.3,
    "alpha1": 0.5,
    "loss_average": "batch",
    "structures": ("dense", "hierarchical(1, 1)"),
    "kl_clip": 1e-2,
    "factor_clip": 0.5,
    "graft": None,
    "seed": 0,
}
singd = functools.partial(SINGD, **OPTIONS)


def whole_after_the_forward_pass(setting: Setting) -> Ends:
    """Parameters stay whole after it, and so after an evaluation; the plan is asked for then."""
    options = {} if setting.layout is None else {"reshard_after_forward": False}

    def planned(model: nn.Module) -> SINGD:
        optimizer = singd(model)
        with torch.no_grad():
            model(batches()[0][0])
        assert sum(row.rule == "SINGD" for row in optimizer.plan().rows) == 12
        return optimizer

    return evaluation(planned, setting, **options)


def not_finite(setting: Setting) -> Ends:
    """One rank has an input that is not finite at the second step: all skip it."""
    model = setting.shard(net())
    optimizer = singd(model)
    for step, (X, y) in enumerate(batches()):
        optimizer.zero_grad()
        if step == 1 and setting.is_first:
            X[0] = float("nan")
        setting.backward(model, X, y)
        optimizer.step()
        assert optimizer.skipped == (step > 0)
    return snapshot(model, optimizer)


def owned(setting: Setting) -> Ends:
    """Every factor is on one rank, and the plan says on which."""
    model = setting.shard(net())
    optimizer = singd(model, places="owned")
    for X, y in batches(2):
        optimizer.zero_grad()
        setting.backward(model, X, y)
        optimizer.step()
    if setting.layout is not None:
        held = torch.tensor([float("K" in optimizer.state[m.weight]) for m in _linear(model)])
        whole_state = sum(nbytes(state) for state in optimizer.state.values())
        assert optimizer.plan().state_bytes == whole_state
        for dim in range(setting.layout.mesh.ndim):
            torch.distributed.all_reduce(held, group=setting.layout.mesh.get_group(dim))
        copies = setting.layout.mesh.size(0) if setting.layout.mesh.ndim == 2 else 1
        assert held.tolist() == [copies] * 6
    return snapshot(model, optimizer)


def _linear(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def checkpointed(setting: Setting, use_reentrant: bool) -> Ends:
    """Activation checkpointing within the groups of parameters."""
    model = net()
    for block in model[1:3]:
        run = functools.partial(checkpoint, block.forward, use_reentrant=use_reentrant)
        block.forward = run
    setting.shard(model)
    optimizer = singd(model)
    for X, y in batches():
        optimizer.zero_grad()
        setting.backward(model, X, y)
        optimizer.step()
    return snapshot(model, optimizer)


def scaled(setting: Setting) -> Ends:
    """A GradScaler that meets an overflow on one rank."""
    model = setting.shard(net())
    optimizer = singd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step, (X, y) in enumerate(batches()):
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
    for X, y in batches():
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
    for X, y in batches():
        optimizer.zero_grad()
        for share in setting.shares():
            setting.loss(model(X[share]), y[share]).backward()
            optimizer.count_terms(share.stop - share.start)
        optimizer.step()
    return snapshot(model, optimizer)


def last_passes(setting: Setting, places: str = "everywhere") -> Ends:
    """Statistics of the pass that reduces gradients; one process captures the same passes."""
    model, rows = setting.shard(net()), 12
    options = {"sample": 1 if setting.layout is None else "last"}
    optimizer = SINGD(model, places=places, **OPTIONS | options)
    for X, y in batches():
        optimizer.zero_grad()
        if setting.layout is None:
            optimizer.count_terms(3 * rows)  # of a third of the rows, which stands for all
        width = rows // setting.ranks // 3  # of all passes
        ranks = range(setting.ranks) if setting.layout is None else [setting.layout.rank]
        for rank in ranks:
            for part in range(3):
                setting.synchronise(model, part == 2)
                first = (3 * rank + part) * width
                some = slice(first, first + width)
                is_paused = setting.layout is None and part < 2
                with optimizer.paused() if is_paused else nullcontext():
                    loss = setting.loss(model(X[some]), y[some], rows)
                loss.backward()
        optimizer.step()
    return snapshot(model, optimizer)


def compiled(setting: Setting) -> Ends:
    """Every block is compiled, then sharded."""
    model = net()
    for block in model[1:3]:
        block.compile(backend="aot_eager")
    setting.shard(model)
    optimizer = singd(model)
    for X, y in batches():
        optimizer.zero_grad()
        setting.backward(model, X, y)
        optimizer.step()
    torch._dynamo.reset()
    return snapshot(model, optimizer)


def mixed(setting: Setting) -> Ends:
    """Passes in bfloat16, everything else in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    layout = setting.layout or Layout(init_device_mesh("cpu", (1,)))
    model = layout.shard(net(torch.float32), mp_policy=policy)
    optimizer = singd(model)
    for X, y in batches():
        optimizer.zero_grad()
        shares = setting.shares()
        for share in shares:
            model.set_requires_gradient_sync(share is shares[-1])
            setting.loss(model(X[share].float()), y[share]).backward()
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
    optimizer = singd(model)
    for X, y in batches():
        optimizer.zero_grad()
        setting.backward(model, X, y)
        optimizer.step()
    assert "exp_avg" in optimizer.state[model.used.weight]
    return snapshot(model, optimizer)


def in_fewer_bits(setting: Setting) -> Ends:
    """Factors in 8 and 24 bits, each on one rank: what is resumed goes on to the bit."""
    options = OPTIONS | {"places": "owned", "preconditioner_dtype": ("int8", "bfloat16+8")}
    models = [setting.shard(net()) for _ in range(2)]
    first, second = (SINGD(model, **options) for model in models)

    def train(run: int, optimizer: SINGD, part: slice) -> None:
        for X, y in batches(6)[part]:
            optimizer.zero_grad()
            setting.backward(models[run], X, y)
            optimizer.step()

    train(0, first, slice(3))
    with torch.no_grad():
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            q.copy_(p)
    second.load_state_dict(first.state_dict())
    for run, optimizer in enumerate((first, second)):
        train(run, optimizer, slice(3, None))
        stored = sum(nbytes(state) for state in optimizer.state.values())
        assert optimizer.plan().state_bytes == stored
    ends = [snapshot(*pair) for pair in zip(models, (first, second), strict=True)]
    assert ends[0].keys() == ends[1].keys()
    assert {t.dtype for t in ends[0].values()} >= {torch.int8, torch.bfloat16}
    assert all(torch.equal(t, ends[1][name]) for name, t in ends[0].items())
    return {"resumed": torch.ones(1)}


#: By how much scenarios differ from one process, where it is not rounding in float64.
TOLERANCES = {"mixed precision": 1e-5}

SCENARIOS: dict[str, Callable[[Setting], Ends]] = (
    {
        "whole after the forward pass": whole_after_the_forward_pass,
        "inputs that are not finite": not_finite,
        "scaled": scaled,
        "counted terms": counted,
        "compiled": compiled,
        "never called": functional,
        "last passes": last_passes,
        "last passes, owned": functools.partial(last_passes, places="owned"),
        "owned": owned,
        "owned, again": owned,
        "in fewer bits": in_fewer_bits,
        "in fewer bits, again": in_fewer_bits,
    }
    | {
        "mixed precision": mixed,
    }
    | {
        f"checkpointed, {reentrant}": functools.partial(checkpointed, use_reentrant=reentrant)
        for reentrant in (False, True)
    }
    | {
        f"grafted to {graft}": functools.partial(grafted, graft=graft)
        for graft in ("running", "rms", "sgd", "adamw")
    }
)


def sharded(context: Context, layout: str, name: str) -> Ends:
    """A scenario on the ranks of a layout."""
    used = context.layouts[layout]
    return SCENARIOS[name](Setting(used, used.ranks))


def alone(layout: str, name: str) -> Ends:
    """The same in one process."""
    return SCENARIOS[name](Setting(None, 2 if layout == "2 ranks" else 4))


def cases() -> dict[str, Any]:
    """Every scenario in one layout, in turn."""
    return {
        f"{name}: {layout}": (sharded, layout, name)
        for name, layout in zip(SCENARIOS, cycle(NAMES), strict=False)
    }
