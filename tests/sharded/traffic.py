"""Bytes that the plan says are sent, and those that are given to collectives."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from singd import SINGD
from singd.placement import replicated
from singd.placement import sharded as sharded_placement
from singd.testing.sharded.setting import Ends, Setting, batches, net
from tests.sharded.layouts import NAMES, Context
from tests.sharded.scenarios import OPTIONS


def traffic(setting: Setting, place: str, **options: Any) -> Ends:
    """Zero if the plan says what is given to collectives, else what was."""
    model = setting.shard(net())
    optimizer = SINGD(model, places=place, **OPTIONS | options)
    planned = optimizer.plan().sent_bytes
    with counting() as sent:
        for X, y in batches(4):  # two updates
            optimizer.zero_grad()
            with sent.pausing():
                setting.backward(model, X, y)
            optimizer.step()
    return {"sent": torch.tensor(0.0 if abs(planned * 4 / sent.bytes - 1) < 1e-9 else sent.bytes)}


SUM_PACKED = replicated.sum_packed_


class counting:  # noqa: N801 - a context manager
    """Counts what this rank sends if collectives go around in a ring.

    Sums are counted where they are of statistics: others are of a few numbers.
    """

    def __init__(self) -> None:
        self.bytes, self.others = 0.0, 0.0
        self._pausing, self._is_summing = False, False

    def pausing(self) -> Any:
        return mock.patch.object(self, "_pausing", True)

    def __enter__(self) -> counting:
        self._patches = []
        for name in ("all_reduce", "reduce", "all_gather", "all_to_all_single"):
            self._patches.append(mock.patch.object(dist, name, self._counted(name)))
        for module in (replicated, sharded_placement):
            self._patches.append(mock.patch.object(module, "sum_packed_", self._summing))
        for patch in self._patches:
            patch.start()
        return self

    def _summing(self, *args: Any, **kwargs: Any) -> None:
        with mock.patch.object(self, "_is_summing", True):
            SUM_PACKED(*args, **kwargs)

    def __exit__(self, *_: object) -> None:
        for patch in self._patches:
            patch.stop()

    def _counted(self, name: str) -> Any:
        original = getattr(dist, name)

        def counted(*args: Any, group: Any = None, **kwargs: Any) -> Any:
            n, me = dist.get_world_size(group), dist.get_rank(group)
            if name == "all_gather":
                sent = (n - 1) * args[1].nbytes
            elif name == "all_to_all_single":
                sent = args[1].nbytes - args[3][me] * args[1].element_size()
            else:
                sent = (1 + (name == "all_reduce")) * (n - 1) / n * args[0].nbytes
                if not self._is_summing:
                    self.others += sent
                    sent = 0
            self.bytes += 0 if self._pausing else sent
            return original(*args, group=group, **kwargs)

        return counted


def quiet(setting: Setting) -> Ends:
    """With C within the rows of ranks a step between updates sends a few numbers, no gradient."""
    model = setting.shard(net())
    optimizer = SINGD(model, places="rows", **OPTIONS | {"structures": ROWS, "T": 4})
    ends = {}
    for step, (X, y) in enumerate(batches(3)):
        optimizer.zero_grad()
        setting.backward(model, X, y)
        with counting() as sent:
            optimizer.step()
        few = (
            2 * 8 * (len(list(model.parameters())) + 20)
        )  # who has a gradient, sums, whether finite
        ends[f"{step}"] = torch.tensor(float(sent.bytes > 0 or sent.others > few))
    assert all(row.place in ("rows", "") for row in optimizer.plan().rows)
    return ends


ROWS = {"3.*": ("dense", "diagonal"), "*": ("dense", "block_diagonal(2)")}
PLACES: dict[str, Any] = {
    "everywhere": partial(traffic, place="everywhere"),
    "owned": partial(traffic, place="owned"),
    "columns": partial(traffic, place="columns"),
    "rows": partial(traffic, place="rows", structures=("dense", "diagonal")),
    "rows of blocks": partial(traffic, place="rows", structures=ROWS),
    "rows, between updates": quiet,
}
LAYOUTS = {"owned": NAMES[3], "rows": NAMES[3]}
EXPECTED = {
    "rows, between updates": {f"{step}": torch.tensor(float(not step)) for step in range(3)}
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
