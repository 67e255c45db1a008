"""Bytes that the plan says are sent, and those that are given to collectives."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from singd import SINGD
from singd.ops.dtensor import local
from singd.state.plan import nbytes
from singd.testing.sharded.counting import Counting
from singd.testing.sharded.setting import Ends, Setting, batches, net
from tests.sharded.layouts import NAMES, Context
from tests.sharded.scenarios import OPTIONS


def traffic(setting: Setting, place: str, **options: Any) -> Ends:
    """Zero if the plan says what is given to collectives, else what was."""
    model = setting.shard(net())
    return trained(setting, model, SINGD(model, places=place, **OPTIONS | options))


def of_statistics(setting: Setting) -> Ends:
    """The same where every rank has the whole model."""
    data = setting.layout.mesh.get_group()
    return trained(setting, model := net(), SINGD(model, process_group=data, **OPTIONS))


def trained(setting: Setting, model: nn.Module, optimizer: SINGD) -> Ends:
    """Zero if a few steps send what the plan says before."""
    planned = optimizer.plan().sent_bytes
    with Counting() as sent:
        for X, y in batches(4):  # two updates
            optimizer.zero_grad()
            setting.backward(model, X, y)
            optimizer.step()
    return {"sent": torch.tensor(0.0 if abs(planned * 4 / sent.bytes - 1) < 1e-9 else sent.bytes)}


def limited(setting: Setting, *, is_sharded: bool = True, **options: Any) -> Ends:
    """Zeros where structures within a limit send no more, the same are chosen on all ranks.

    A limit that is not reached changes nothing.
    """
    data = setting.layout.mesh.get_group()

    def chosen(limits: dict[str, float]) -> tuple[Any, float, float]:
        """Structures, bytes sent over those of gradients, and nats lost."""
        model = setting.shard(net()) if is_sharded else net()
        optimizer = SINGD(
            model,
            structures="auto",
            budget={"state": 9.0, **limits},
            process_group=None if is_sharded else data,
            T=1,
            **options,
        )
        for X, y in batches(3):
            optimizer.zero_grad()
            setting.backward(model, X, y)
            optimizer.step()
        weights = [p for n, p in model.named_parameters() if "norm" not in n]
        sent = torch.tensor(optimizer.plan().sent_bytes, dtype=torch.float64)
        dist.all_reduce(sent, group=data)
        (own,) = optimizer.param_groups
        lost = sum(own["nats_lost"].values())
        return own["structures"], float(sent / setting.ranks / sum(p.nbytes for p in weights)), lost

    free = chosen({})
    ends = {"loose": float(chosen({"sent": 1.001 * free[1]}) != free)}
    for share in (0.75, 0.5, 0.45):
        structures, sent, lost = chosen({"sent": share * free[1]})
        others = [None] * setting.ranks
        dist.all_gather_object(others, structures, group=data)
        fits = sent <= share * free[1] and lost >= free[2] and structures != free[0]
        ends[f"{share}"] = float(not fits or others != [structures] * setting.ranks)
    return {name: torch.tensor(fault) for name, fault in ends.items()}


def work(setting: Setting) -> Ends:
    """Zero where ranks plan to share directions, and owners updates, of those of one process."""
    model = setting.shard(net())

    def planned(place: str, T: int) -> float:
        given = {"structures": ("dense", "diagonal"), "T": T}
        with SINGD(model, places=place, **OPTIONS | given) as optimizer:
            return optimizer.plan().flops

    once, twice = planned("everywhere", 1), planned("everywhere", 2)
    updates, directions = 2 * (once - twice), 2 * twice - once
    ranks = setting.ranks
    expected = {
        "owned": updates + directions,
        "columns": ranks * updates + directions,
        "rows": ranks * updates + directions,
    }
    ends = {}
    for place, flops in expected.items():
        found = torch.tensor(planned(place, 1), dtype=torch.float64)
        dist.all_reduce(found)
        ends[place] = torch.tensor(0.0) if abs(found / flops - 1) < 1e-9 else found
    return ends


def quiet(setting: Setting) -> Ends:
    """With C within the rows of ranks a step between updates sends a few numbers, no gradient."""
    model = setting.shard(net())
    optimizer = SINGD(model, places="rows", **OPTIONS | {"structures": ROWS, "T": 4})
    ends = {}
    for step, (X, y) in enumerate(batches(3)):
        optimizer.zero_grad()
        setting.backward(model, X, y)
        with Counting() as sent:
            optimizer.step()
        few = (
            2 * 8 * (len(list(model.parameters())) + 20)
        )  # who has a gradient, sums, whether finite
        ends[f"{step}"] = torch.tensor(float(sent.bytes > 0 or sent.others > few))
    assert all(row.place in ("rows", "") for row in optimizer.plan().rows)
    return ends


def shared(setting: Setting) -> Ends:
    """Every rank has the rows of C that it has of the weight, and the plan says so."""
    model: Any = setting.shard(net())
    optimizer = SINGD(model, places="rows", **OPTIONS | {"structures": ROWS})
    for X, y in batches(2):
        optimizer.zero_grad()
        setting.backward(model, X, y)
        optimizer.step()
    assert optimizer.plan().state_bytes == sum(nbytes(s) for s in optimizer.state.values())
    weight = model[1].inner.weight  # of 5 rows: blocks of 2, 2 and 1
    return {
        "rows": sum(C.shape[-1] * C.shape[:-2].numel() for C in optimizer.state[weight]["C"])
        - torch.tensor(float(local(weight).shape[0]))
    }


def exchanges(setting: Setting) -> Ends:
    """Rows and columns of all matrices are exchanged together, there and back, in each step."""
    model = setting.shard(net())
    optimizer = SINGD(model, places="columns", **OPTIONS)
    ends = {}
    for step, (X, y) in enumerate(batches(3)):
        optimizer.zero_grad()
        setting.backward(model, X, y)
        with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as sent:
            optimizer.step()
        ends[f"{step}"] = torch.tensor(float(sent.call_count))
    return ends


def buffers(setting: Setting) -> Ends:
    """Statistics go to their owners block by block, in the backward pass.

    Zero if no rank ever has statistics of more than a block beside those that it owns.
    """
    model = setting.shard(net())
    optimizer = SINGD(model, places="owned", **OPTIONS)
    parts, most = optimizer._parts, [0]
    send = parts.placement.send

    def held() -> dict[str, int]:
        found: dict[str, int] = {}
        for matrix, a in parts.capture.accumulators.items():
            for one in (a._sum, a._held):
                if one is not None and not one.is_summed:
                    tensors = [*one.input.tensors(), *one.grad.tensors()]
                    block = matrix.name.split(".")[0]
                    found[block] = found.get(block, 0) + sum(t.nbytes for t in tensors)
        return found

    def watched(matrix: Any, one: Any) -> Any:
        assert len(held().keys() - {matrix.name.split(".")[0]}) == 0
        most[0] += 1
        return send(matrix, one)

    parts.placement.send = watched  # type: ignore[method-assign]
    for X, y in batches(3):
        optimizer.zero_grad()
        setting.backward(model, X, y)
        assert not held()
        optimizer.step()
    return {"sends": torch.tensor(float(most[0]))}  # of 6 matrices, at two updates


ROWS = {"3.*": ("dense", "diagonal"), "*": ("dense", "block_diagonal(2)")}
PLACES: dict[str, Any] = {
    "everywhere": partial(traffic, place="everywhere"),
    "owned": partial(traffic, place="owned"),
    "columns": partial(traffic, place="columns"),
    "rows": partial(traffic, place="rows", structures=("dense", "diagonal")),
    "rows of blocks": partial(traffic, place="rows", structures=ROWS),
    "statistics alone": of_statistics,
    "limited": limited,
    "limited, owned": partial(limited, places="owned"),
    "limited statistics": partial(limited, is_sharded=False),
    "work": work,
    "rows, between updates": quiet,
    "columns, in one": exchanges,
    "rows of C": shared,
    "one block at a time": buffers,
}
LAYOUTS = {"owned": NAMES[3], "rows": NAMES[3], "work": NAMES[0], "limited statistics": NAMES[2]}
WITHIN = {name: torch.zeros(()) for name in ("loose", "0.75", "0.5", "0.45")}
EXPECTED = {
    "limited": WITHIN,
    "limited, owned": WITHIN,
    "limited statistics": WITHIN,
    "work": dict.fromkeys(("owned", "columns", "rows"), torch.zeros(())),
    "rows, between updates": {f"{step}": torch.tensor(float(not step)) for step in range(3)},
    "columns, in one": {f"{step}": torch.tensor(2.0) for step in range(3)},
    "rows of C": {"rows": torch.zeros(())},
    "one block at a time": {"sends": torch.tensor(12.0)},
}


def sent(context: Context, layout: str, place: str) -> Ends:
    """Zero if the plan was right, on the ranks of a layout."""
    used = context.layouts[layout]
    return PLACES[place](Setting(used, used.ranks))


def cases() -> dict[str, Any]:
    """Every place in one layout."""
    return {
        f"bytes sent, {place}: {layout}": (sent, layout, place)
        for place, layout in ((place, LAYOUTS.get(place, NAMES[0])) for place in PLACES)
    }
