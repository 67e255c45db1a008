"""Two stages of a pipeline, each on two ranks that share the samples."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from singd import SINGD
from singd.testing.sharded.rows import snapshot
from singd.testing.sharded.setting import Ends, Layout, Setting, batches, net
from tests.sharded.layouts import Context
from tests.sharded.scenarios import OPTIONS

GROUP = "2 ranks"  # of one stage


def stages() -> tuple[nn.Module, nn.Module]:
    """The first and the last layers."""
    whole = net()
    return whole[:2], whole[2:]


def forwards_and_back(
    stage: int, model: nn.Module, setting: Setting, X: Tensor, y: Tensor, other: int
) -> None:
    """One pass of a rank, whose partner has the other stage."""
    (share,) = setting.shares()
    if stage == 0:
        h = model(X[share])
        dist.send(h.detach(), other)
        grad = torch.empty_like(h)
        dist.recv(grad, other)
        h.backward(grad)
    else:
        h = torch.empty(share.stop - share.start, 6, dtype=X.dtype)
        dist.recv(h, other)
        setting.loss(model(h.requires_grad_()), y[share]).backward()
        assert h.grad is not None
        dist.send(h.grad, other)


def run(context: Context, is_sharded: bool) -> Ends:
    """What this rank's stage ends with."""
    used: Layout = context.layouts[GROUP]
    stage, setting = dist.get_rank() // 2, Setting(used, used.ranks)
    model = stages()[stage]
    if is_sharded:
        setting.shard(model)
    group = None if is_sharded else used.mesh.get_group()
    optimizer = SINGD(model, process_group=group, **OPTIONS)
    for X, y in batches():
        optimizer.zero_grad()
        forwards_and_back(stage, model, setting, X, y, (dist.get_rank() + 2) % 4)
        optimizer.step()
    return both(snapshot(model, optimizer))


def both(ends: Ends) -> Ends:
    """What the two stages end with, on every rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, ends)
    assert all(
        torch.equal(t, found[rank + 1][k]) for rank in (0, 2) for k, t in found[rank].items()
    )
    return {f"{stage} {k}": t for stage, rank in enumerate((0, 2)) for k, t in found[rank].items()}


def refused(context: Context) -> Ends:
    """Without their group, ranks of all stages find out that they differ."""
    model = stages()[dist.get_rank() // 2]
    optimizer = SINGD(model, **OPTIONS)
    model(torch.ones(2, 4 if dist.get_rank() < 2 else 6, dtype=torch.float64)).sum().backward()
    try:
        optimizer.step()
    except ValueError as error:
        assert "pipeline stage needs process_group" in str(error)  # noqa: PT017 - is to be raised
        return {}
    raise AssertionError("ranks with other parameters took a step together")


def alone(*_: Any) -> Ends:
    """One process with both stages, and an optimizer for each."""
    setting, models = Setting(None, 2), stages()
    optimizers = [SINGD(model, **OPTIONS) for model in models]
    for X, y in batches():
        for optimizer in optimizers:
            optimizer.zero_grad()
        for share in setting.shares():
            setting.loss(models[1](models[0](X[share])), y[share]).backward()
        for optimizer in optimizers:
            optimizer.step()
    return {
        f"{stage} {k}": t
        for stage, pair in enumerate(zip(models, optimizers, strict=True))
        for k, t in snapshot(*pair).items()
    }


def cases() -> dict[str, Any]:
    return {
        "stages": (run, False),
        "stages, sharded": (run, True),
        "stages without their group": (refused,),
    }
