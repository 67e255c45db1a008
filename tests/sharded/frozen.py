"""Configurations of ``tests/frozen``, trained by ranks with a share of every batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from singd.ops.dtensor import local
from singd.testing.sharded.rows import snapshot
from tests.frozen.cases import CASES
from tests.frozen.train import WAYS, Run
from tests.sharded.layouts import NAMES, Context

#: Parameters that another module than their own reads: one group has them all.
SHARED = ("net tied", "net unseen", "unseen, resumed")

_NETS = ("sequence", "conv2d", "grouped", "transposed2d", "attention", "attention, sizes", "heads")
_WAYS = ("bad inputs", "curvature", "precondition", "resumed", "two groups", "added group",
         "paused", "new structures", "frozen layer")  # fmt: skip
_OPTIONS = ("no momentum", "bare", "loss is a sum", "max_dim, wide_structure", "patterns")
_OTHERS = ("structure lower_toeplitz", "structure low_rank_upper(1)", "reduce", "norms by AdamW",
           "optional layers", "grafted to AdamW", "attention, micro")  # fmt: skip

_OWNED = ("net tied", "net grouped", "net transposed2d", "net attention", "net heads",
          "way resumed", "way added group", "way new structures", "optional layers")  # fmt: skip

_COLUMNS = ("net sequence", "net conv2d", "structure lower_toeplitz", "structure low_rank_upper(1)")

_CHOSEN = [
    *SHARED,
    *(name for name in CASES if name.startswith("method")),
    *(f"option {name}" for name in _OPTIONS),
    *(f"net {name}" for name in _NETS),
    *(f"way {name}" for name in _WAYS),
    *_OTHERS,
]


def sharded(context: Context, layout: str, name: str, places: str) -> dict[str, Tensor]:
    """One configuration on the ranks of a layout."""
    used = context.layouts[layout]
    case = replace(CASES[name], ranks=used.ranks, options=CASES[name].options | {"places": places})

    class Sharded(Run):
        def wrapped(self, model: nn.Module) -> nn.Module:
            return used.shard(model)

        def spoil(self, gradient: Tensor) -> None:
            if self.rank == 0:
                super().spoil(local(gradient))

    run = Sharded(case, used.rank)
    WAYS[case.way](run)
    ended = snapshot(run.model, run.optimizer)
    run.optimizer.close()
    return ended


def alone(layout: str, name: str, places: str) -> dict[str, Tensor]:
    """The same in one process."""
    run = Run(replace(CASES[name], ranks=1))
    WAYS[CASES[name].way](run)
    return snapshot(run.model, run.optimizer)


def cases() -> dict[str, Any]:
    """Every configuration in one layout, in turn; some where one rank has the factors."""
    found = {}
    for number, name in enumerate(_CHOSEN):
        layout = NAMES[1] if name in SHARED else NAMES[number % len(NAMES)]
        found[f"{name}: {layout}"] = (sharded, layout, name, "everywhere")
        if name in _OWNED:
            found[f"{name}, owned: {layout}"] = (sharded, layout, name, "owned")
        if name in _COLUMNS:
            found[f"{name}, columns: {layout}"] = (sharded, layout, name, "columns")
    return found
