"""The rows of :func:`singd.testing.check_sharded` for every method, and for faulty placements."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor, nn

from singd import KFAC, SINGD, SOAP, KLShampoo
from singd.methods import batched
from singd.placement import sums
from singd.testing.sharded import SHARDED_ROWS, Setting
from singd.testing.sharded.counting import REDUCE_SCATTER
from singd.testing.sharded.setting import Ends
from tests.sharded.layouts import NAMES, Context
from tests.sharded.scenarios import OPTIONS

EXACT = "SINGD, bit by bit"

ROWED = OPTIONS | {"structures": ("dense", "diagonal")}
BLOCKS = OPTIONS | {"structures": ("hierarchical(1, 1)", "block_diagonal(2)")}

METHODS: dict[str, Any] = {
    "SINGD": partial(SINGD, **OPTIONS),
    "SINGD as it is": SINGD,
    "SINGD, sampled": partial(SINGD, sample=3, **OPTIONS),
    "SINGD, automatic": partial(SINGD, structures="auto", T=1),
    EXACT: partial(SINGD, **OPTIONS | {"kl_clip": None, "lr": 0.02}),
    "SINGD, owned": partial(SINGD, places="owned", **OPTIONS),
    "SINGD, columns": partial(SINGD, places="columns", **OPTIONS),
    "SINGD, columns, without products": partial(
        SINGD, places="columns", keep_products=False, **OPTIONS
    ),
    "SINGD, rows": partial(SINGD, places="rows", **ROWED),
    "SINGD, rows, fused": partial(SINGD, places="rows", **ROWED | {"alpha1": 0.0}),
    "SINGD, rows, fused blocks": partial(SINGD, places="rows", **BLOCKS | {"alpha1": 0.0}),
    "SINGD, rows, bare": partial(
        SINGD,
        places="rows",
        **BLOCKS | {"relative_damping": False, "scale_init": False, "normalize_lr_cov": True},
    ),
    "SINGD, rows, IKFAC": partial(
        SINGD, places="rows", kfac_like=True, **BLOCKS | {"graft": "rms", "kl_clip": None}
    ),
    "SINGD, rows, without products": partial(SINGD, places="rows", keep_products=False, **BLOCKS),
    "SINGD, 24 and 8 bits": partial(
        SINGD, preconditioner_dtype=("bfloat16+8", "int8"), places="owned", **OPTIONS
    ),
    "KFAC, columns": partial(KFAC, places="columns"),
    "KFAC": KFAC,
    "KFAC, owned": partial(KFAC, places="owned"),
    "KLShampoo": KLShampoo,
    # damped, so that rounding does not turn bases of nearly equal eigenvalues
    "SOAP": partial(SOAP, damping=1e-2),
    "SOAP, few directions": partial(SOAP, damping=1e-2, rank=2),
    "SOAP, owned": partial(SOAP, damping=1e-2, places="owned"),
    "KLShampoo, owned": partial(KLShampoo, places="owned"),
}
_SOME = ("uneven_shares", "passes_that_are_not_reduced", "a_gradient_that_is_not_finite")
ROWS: dict[str, Iterable[str]] = {
    "SINGD": SHARDED_ROWS,
    "SINGD as it is": ("uneven_shares", "noise"),
    "SINGD, sampled": ("uneven_shares", "passes_that_are_not_reduced"),
    "SINGD, automatic": ("uneven_shares", "noise"),
    EXACT: ("noise",),
    "SINGD, owned": SHARDED_ROWS,
    "SINGD, columns": (*_SOME, "a_rank_without_samples", "parameters_that_are_not_sharded"),
    "SINGD, columns, without products": _SOME[:1],
    "SINGD, rows": (*_SOME, "a_rank_without_samples", "parameters_that_are_not_sharded"),
    "SINGD, rows, fused": (*_SOME, "a_rank_without_samples", "noise"),
    "SINGD, rows, fused blocks": _SOME,
    "SINGD, rows, bare": _SOME[:1],
    "SINGD, rows, IKFAC": _SOME[:2],
    "SINGD, rows, without products": _SOME[:2],
    "SINGD, 24 and 8 bits": ("noise",),
    "KFAC, columns": _SOME[:1],
    "KFAC": _SOME,
    "KFAC, owned": _SOME[:1],
    "KLShampoo": (*_SOME, "parameters_that_are_not_sharded"),
    "KLShampoo, owned": _SOME[:1],
    "SOAP": _SOME[:2],
    "SOAP, few directions": _SOME[:2],
    "SOAP, owned": _SOME[:1],
}


class WrongScale(SINGD):
    """Takes ranks for one, in the scale of the statistics."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, **OPTIONS)
        self._parts.placement.size = 1


class WithoutReduction(SINGD):
    """Every rank goes by its own statistics, but says that it has those of all."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, **OPTIONS)
        self._parts.placement.reduce = lambda statistics: statistics  # type: ignore[method-assign]


class WithoutSums(SINGD):
    """Every rank keeps the statistics of its own matrices, and sends those of others to nobody."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, **OPTIONS | {"places": "owned"})
        send = lambda _, one: replace(one, is_summed=True)  # noqa: E731
        self._parts.placement.send = send  # type: ignore[method-assign]


class WithoutAverages(SINGD):
    """Gradients of parameters that are not sharded are averaged by nobody."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, **OPTIONS)
        self._parts.placement.average_gradients = lambda _: None  # type: ignore[method-assign]


class LocalNorms(SINGD):
    """Every rank bounds its step by the norms of what it holds."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, **OPTIONS | {"graft": "rms", "kl_clip": None, "lr": 0.01})
        self._parts.placement.complete_norms = lambda norms: norms  # type: ignore[method-assign]


class NoiseOfTheRank(SINGD):
    """Every rank rounds with a seed of its own."""

    def __init__(self, model: nn.Module) -> None:
        rank = dist.get_rank() if dist.is_initialized() else 0
        super().__init__(model, **OPTIONS | {"seed": rank})


class HookOfTheShard(SINGD):
    """Waits for the gradient of the sharded parameter, not for that of a pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, **OPTIONS)
        self._parts.capture._meet = lambda *_: None  # type: ignore[method-assign]


class RowsForAll(SINGD):
    """Every rank takes its rows of a factor for the whole, in traces and norms."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, places="rows", **BLOCKS | {"alpha1": 0.0})

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """Without the sums over ranks."""
        with mock.patch.object(batched, "completed", lambda numbers, _: list(numbers)):
            return super().step(closure)


class RowsOfAnother(SINGD):
    """Every rank has the statistics of the rows of the next one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, places="rows", **BLOCKS | {"alpha1": 0.0})
        reduce = self._parts.placement.reduce

        def turned(statistics: Any) -> Any:
            with mock.patch.object(sums, "reduce_scatter", self._turned):
                return reduce(statistics)

        self._parts.placement.reduce = turned  # type: ignore[method-assign]

    @staticmethod
    def _turned(sent: Tensor, count: int, group: Any) -> Tensor:
        return REDUCE_SCATTER(sent.view(-1, count).roll(1, 0).flatten(), count, group)


#: What faults are compared with that are not made of "SINGD".
RIGHT = {"RowsForAll": "SINGD, rows, fused blocks", "RowsOfAnother": "SINGD, rows, fused blocks"}

#: Every fault with a row that it fails.
FAULTS: dict[type[SINGD], str] = {
    RowsForAll: "uneven_shares",
    RowsOfAnother: "uneven_shares",
    WrongScale: "uneven_shares",
    WithoutReduction: "uneven_shares",
    WithoutSums: "uneven_shares",
    WithoutAverages: "parameters_that_are_not_sharded",
    LocalNorms: "uneven_shares",
    NoiseOfTheRank: "noise",
    HookOfTheShard: "passes_that_are_not_reduced",
}


def on_rank(context: Context, layout: str, method: str, row: str) -> Ends:
    used = context.layouts[layout]
    return SHARDED_ROWS[row](METHODS[method], Setting(used, used.ranks))


def alone(layout: str, method: str, row: str) -> Ends:
    return SHARDED_ROWS[row](METHODS[method], Setting(None, 2 if layout == "2 ranks" else 4))


def faulty(context: Context, layout: str, fault: str, row: str) -> Ends:
    used = context.layouts[layout]
    (cls,) = (c for c in FAULTS if c.__name__ == fault)
    return SHARDED_ROWS[row](cls, Setting(used, used.ranks))


def cases() -> dict[str, Any]:
    """The rows of every method, each in a layout in turn."""
    turns = cycle([*NAMES, NAMES[0]])  # so that every row meets every layout, by and by
    pairs = [(method, row) for method in METHODS for row in ROWS[method]]
    chosen = [(*pair, layout) for pair, layout in zip(pairs, turns, strict=False)]
    chosen += [(EXACT, "noise", layout) for layout in NAMES]
    return {
        f"{method}, {row}: {layout}": (on_rank, layout, method, row)
        for method, row, layout in chosen
    }


def faults() -> dict[str, Any]:
    return {
        f"{cls.__name__}, {row}": (faulty, NAMES[0], cls.__name__, row)
        for cls, row in FAULTS.items()
    }
