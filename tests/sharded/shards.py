"""Factors of shards under tensor parallelism: bytes, checkpoints, and what is refused."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from singd import SINGD
from singd.capture import reading
from singd.methods import batched
from singd.ops import dtensor
from singd.testing.sharded.counting import Counting
from singd.testing.sharded.rows import snapshot
from singd.testing.sharded.setting import Ends, Setting
from tests.sharded.layouts import Context
from tests.sharded.parallel import KINDS, POSITIONS, ROWS, RUNS, STEPS, Net, Parallel, parallel
from tests.sharded.scenarios import OPTIONS
from tests.singd.runs import batches

REFUSED = {
    ("dense", "dense"): "one.up.weight: places='shards' expects a diagonal structure, or blocks "
    "that divide the shard of 4 outputs: got one that mixes all",
    ("dense", "block_diagonal(3)"): "shard of 4 outputs: got blocks of 3",
    ("block_diagonal(8)", "diagonal"): "one.down.weight: places='shards' expects a diagonal "
    "structure, or blocks that divide the shard of 4 inputs: got blocks of 8",
}


def sent(context: Context, name: str, option: str) -> Ends:
    """Zero if the plan says what is given to collectives, and shards are not gathered."""
    mesh, *how = KINDS[name]
    used = Parallel(context.meshes[mesh], *how)
    setting = Setting(used, used.ranks)
    model = used.shard(Net())
    optimizer = SINGD(model, **OPTIONS | RUNS[option], data=used.data())
    planned = optimizer.plan().sent_bytes
    ours: list[Any] = []
    gather = dtensor.whole
    with (
        Counting() as counting,
        mock.patch.object(reading, "whole", lambda t: ours.append(t) or gather(t)),
    ):
        for X, y in batches(4, ROWS, POSITIONS, 4):
            optimizer.zero_grad()
            setting.backward(model, X, y)
            optimizer.step()
    parts = [
        t
        for t in ours
        if dtensor.is_distributed(t) and any(p.is_shard(t.ndim - 1) for p in t.placements)
    ]
    off = abs(planned * 4 - counting.bytes) / max(counting.bytes, 1.0)
    return {
        "sent": torch.tensor(off if off > 1e-9 else 0.0),
        "gathered": torch.tensor(float(len(parts))),
    }


def refused(context: Context, name: str, option: str) -> Ends:
    """A structure that does not fit, which was asked for by name, is an error at once."""
    mesh, *how = KINDS[name]
    used = Parallel(context.meshes[mesh], *how)
    model = used.shard(Net())
    for structures, message in REFUSED.items():
        try:
            SINGD(model, places="shards", structures=structures, data=used.data())
        except ValueError as error:
            assert message in str(error), error  # noqa: PT017 - is to be raised
        else:
            raise AssertionError(f"{structures} was taken")
    optimizer = SINGD(model, structures=("dense", "dense"), data=used.data())
    assert {row.place for row in optimizer.plan().rows} <= {"everywhere", ""}
    return {}


def save(context: Context, name: str, option: str) -> Ends:
    """Ranks save a checkpoint, and go on."""
    return resumed(context, name, option, 3, saves=True)


def resumed(
    context: Context | None, name: str, option: str, first: int = 0, *, saves: bool = False
) -> Ends:
    """Train, after a checkpoint if there is one; one process if there is no context or layout."""
    mesh, *how = KINDS.get(name, ("", False, False))
    used = Parallel(context.meshes[mesh], *how) if context is not None and mesh else None
    setting = Setting(used, 1 if used is None else used.ranks)
    model = setting.shard(Net())
    group = None if context is None or used is not None else context.single.get_group()
    data = {"process_group": group} if used is None else {"data": used.data()}
    optimizer = SINGD(model, **OPTIONS | {"loss_average": "batch"} | RUNS[option] | data)
    every = batches(STEPS + 2, ROWS, POSITIONS, 4)
    if context is not None and not saves:
        weights, state = get_state_dict(model, optimizer)
        saved = {"model": weights, "optimizer": state}
        dcp.load(saved, checkpoint_id=context.folder / option, no_dist=used is None)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
        )
        every = every[3:]
    for step, (X, y) in enumerate(every):
        if saves and step == first and context is not None:
            weights, state = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": state}, checkpoint_id=context.folder / option)
        optimizer.zero_grad()
        setting.backward(model, X, y)
        optimizer.step()
    return snapshot(model, optimizer)


def broken(context: Context, name: str, option: str) -> Ends:
    """Shards that take their own traces and norms for those of the whole end elsewhere."""
    right = parallel(context, name, option)
    with mock.patch.object(batched, "completed", lambda numbers, _: list(numbers)):
        wrong = parallel(context, name, option)
    differs = any(not torch.allclose(t, wrong[key], rtol=1e-6) for key, t in right.items())
    return {"differs": torch.tensor(float(differs))}


def alone(function: Any, name: str, option: str) -> Ends:
    """What is expected."""
    if function is sent:
        return {"sent": torch.zeros(()), "gathered": torch.zeros(())}
    if function is broken:
        return {"differs": torch.ones(())}
    if function in (save, resumed):
        return resumed(None, "one process", option)
    return {}


def cases() -> dict[str, Any]:
    names, options = list(KINDS), ("shards, fused", "shards of numbers")
    found: dict[str, Any] = {
        f"{name}, bytes of shards": (sent, name, options[0]) for name in (names[0], names[2])
    }
    found[f"{names[1]}, shards refused"] = (refused, names[1], "")
    found |= {f"{name}, broken shards": (broken, name, options[0]) for name in names[:2]}
    for option in options:
        found[f"{names[0]}, saved, {option}"] = (save, names[0], option)
        for name in (names[2], "one process"):
            found[f"{name}, loaded, {option}"] = (resumed, name, option)
    return found
