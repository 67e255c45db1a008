"""Every structure, and structures and places by the names of parameters."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import nn

from singd import SINGD
from singd.choice import choose_structures
from singd.testing.sharded.rows import snapshot
from singd.testing.sharded.setting import F64, Ends, Setting, batches, net
from tests.frozen.cases import EVEN_STRUCTURES, STRUCTURES
from tests.sharded.layouts import NAMES, Context
from tests.sharded.scenarios import OPTIONS

SPECS = (*STRUCTURES, *EVEN_STRUCTURES, "rotated(lower_triangular, hadamard)", "dense")


def deep() -> nn.Module:
    """A layer for each structure."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Linear(4, 8), nn.Tanh()]
        for _ in SPECS:
            layers += [nn.Linear(8, 8, bias=False), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(8, 3)).to(F64)


def every_structure(setting: Setting, **options: Any) -> Ends:
    """On both sides of a layer of its own."""
    model = setting.shard(deep())
    pairs = {f"{2 * i + 2}.*": (spec, spec) for i, spec in enumerate(SPECS)}
    optimizer = SINGD(
        model, **OPTIONS | {"structures": pairs | {"*": ("dense", "dense")}}, **options
    )
    for X, y in batches(3):
        optimizer.zero_grad()
        setting.backward(model, X, y)
        optimizer.step()
    return snapshot(model, optimizer)


def structures_by_budget(setting: Setting) -> Ends:
    """The structures that lose the fewest nats are found alike, and trained with."""
    model = setting.shard(net())
    (share, *_), (X, y) = setting.shares(), batches()[0]
    if setting.layout is None:  # of one batch, that all ranks share
        losses = (sum(setting.loss(model(X[s]), y[s]) for s in setting.shares()) for _ in range(1))
    else:
        losses = (setting.loss(model(X[share]), y[share]) for _ in range(1))
    chosen = choose_structures(model, losses, budget=0.75)
    optimizer = SINGD(model, T=2, burn_in=0, structures=chosen)
    for X, y in batches():
        optimizer.zero_grad()
        setting.backward(model, X, y)
        optimizer.step()
    nats = {
        f"{name} nats": torch.tensor([o.nats for o in both], dtype=F64)
        for name, both in chosen.sides.items()
    }
    return snapshot(model, optimizer) | nats


def passes_that_are_all_reduced(setting: Setting, places: str) -> Ends:
    """Three backward passes a step, one of which is not captured."""
    model = setting.shard(net())
    optimizer = SINGD(model, places=places, **OPTIONS)
    for step, (X, y) in enumerate(batches()):
        optimizer.zero_grad()
        for part in range(3):
            with optimizer.paused() if part == step % 3 else nullcontext():
                setting.backward(model, X + part, y)
        optimizer.step()
    return snapshot(model, optimizer)


def places_by_name(setting: Setting) -> Ends:
    """The first pattern that matches says where factors are worked on."""
    places = {"0.*": "owned", "*.inner.*": "columns", "3.*": "everywhere"}
    model = setting.shard(net())
    optimizer = SINGD(model, places=places, **OPTIONS)
    for X, y in batches():
        optimizer.zero_grad()
        setting.backward(model, X, y)
        optimizer.step()
    if setting.layout is not None:
        found = {row.parameter: row.place.split(" ")[0] for row in optimizer.plan().rows}
        assert found["0.weight"] == "owned"
        assert found["1.inner.weight"] == found["2.inner.weight"] == "columns"
        assert found["3.weight"] == "everywhere"
    return snapshot(model, optimizer)


SCENARIOS: dict[str, Callable[[Setting], Ends]] = {
    "every structure": every_structure,
    "structures by budget": structures_by_budget,
    "places by name": places_by_name,
    "passes that are all reduced": partial(passes_that_are_all_reduced, places="everywhere"),
    "passes that are all reduced, owned": partial(passes_that_are_all_reduced, places="owned"),
}


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
