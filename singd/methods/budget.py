"""What a budget limits, and the structures of weights that share one."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from singd.capture.warning import warn_user
from singd.capture.weight_matrix import WeightMatrix
from singd.methods.base import Options, Sent
from singd.methods.covariances import CountedCovariances
from singd.methods.flops import flops_of
from singd.methods.inverse_free import InverseFree
from singd.methods.options import graft_of
from singd.methods.sent import Asked, Groups, sending
from singd.methods.structure_choice import (
    Chosen,
    Option,
    Sides,
    StructureChoice,
    cheapest,
    fewest_nats,
    in_words,
    needed,
    options_of,
)
from structured import parse

PASSES = 6.0
"""Floating-point operations of a forward and a backward pass for a row and a number of a weight."""

STATE = 1.5
"""State as a multiple of AdamW's, unless it is given."""


SHARES = {
    "flops": "those of the passes of the weights",
    "sent": "the bytes of the gradients of the weights",
}
"""Limits beside the state, and what they are multiples of."""


def check_budget(budget: Any) -> None:
    """Raise ``ValueError`` unless it is a multiple or a number of bytes, or a mapping of limits."""
    if isinstance(budget, Mapping):
        if not budget or set(budget) - {"state", *SHARES}:
            raise ValueError(
                f"budget: expected limits of 'state', 'flops' or 'sent', got {dict(budget)!r}"
            )
        check_budget(budget.get("state", STATE))
        for name, whole in SHARES.items():
            share = budget.get(name, 1.0)
            if not _is_positive(share):
                raise ValueError(f"budget: expected {name} as a multiple of {whole}, got {share!r}")
    elif not _is_positive(budget) or (isinstance(budget, int) and budget < 1000):
        raise ValueError(
            "budget: expected a multiple of AdamW's state (a float) or bytes (an integer of 1000 "
            f"or more), got {budget!r}"
        )


def _is_positive(value: Any) -> bool:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    return good and 0 < value < math.inf


def limits_of(budget: Any) -> dict[str, float]:
    """The limits of a budget; the state's is there in any case."""
    return {"state": STATE, **budget} if isinstance(budget, Mapping) else {"state": budget}


def limits_within(groups: Groups) -> dict[str, float]:
    """How many numbers, operations in a step and bytes sent in it the factors of weights may have.

    All groups have the same budget.
    """
    matrices = [(m, both, options) for options, some in groups for m, both in some.items()]
    limits = limits_of(matrices[0][2]["budget"])
    state = limits["state"]
    weights = sum(math.prod(m.shape) for m, _, _ in matrices)
    itemsize = max(m.weight.element_size() for m, _, _ in matrices)
    norms = 2 * max(4 // itemsize, 1)  # of directions: two numbers, in float32 at least
    beside = sum(math.prod(m.shape) for m, _, options in matrices if options["momentum"])
    beside += sum(norms for _, _, options in matrices if graft_of(options) == "running")
    numbers = state // itemsize if isinstance(state, int) else 2 * state * weights
    found: dict[str, float] = {"numbers": int(numbers) - beside}
    if "flops" in limits:
        passes = sum(PASSES * math.prod(m.shape) * both.mean_rows() for m, both, _ in matrices)
        found["flops"] = limits["flops"] * passes
    if "sent" in limits:
        sizes = (math.prod(m.shape) * m.weight.element_size() for m, _, _ in matrices)
        found["sent"] = limits["sent"] * sum(sizes)
    return found


def choose(
    groups: Groups,
    candidates: Sequence[str],
    agree: Callable[[Sequence[float]], Sequence[float]],
    sent: Sent,
    *,
    strict: bool = False,
) -> StructureChoice:
    """The structures of weights that share a budget.

    Args:
        groups: Options of groups of the same budget, with the averages of their weights.
        candidates: Specs that are compared on every side.
        agree: Means of numbers over ranks, so that all choose alike.
        sent: Bytes that this rank would send in a step for weights with given options.
        strict: Raise where a budget is too small, otherwise warn.
    """
    of_name: dict[str, dict[WeightMatrix, tuple[CountedCovariances, Options]]] = {}
    for options, factors in groups:
        for matrix, both in factors.items():
            of_name.setdefault(matrix.name, {})[matrix] = both, options
    limits = limits_within(groups)
    most = limits.pop("sent", math.inf)
    count = _Counted() if "flops" in limits else lambda *_: 0.0
    sides = {
        (name, side): _table(matrices, side, candidates, agree, count)
        for name, matrices in of_name.items()
        for side in (0, 1)
    }
    chosen, limits = _within(sides, limits, strict=strict)
    if most < math.inf:
        asked = Asked(groups, agree, sent)
        chosen = sending(chosen, asked, most, sides, limits, strict=strict)
    return StructureChoice({n: (chosen[n, 0], chosen[n, 1]) for n in of_name}, limits)


def _within(
    sides: Sides, limits: dict[str, float], *, strict: bool
) -> tuple[Chosen, dict[str, float]]:
    """What is chosen within limits, or the cheapest; and the limits, or what the cheapest needs."""
    least = needed(cheapest(sides, limits), limits)
    short = [cost for cost, top in limits.items() if top < least[cost]]
    if not short or strict:
        return fewest_nats(sides, limits), limits
    warn_user(
        f"budget: expected at least {in_words(least, short)} for the factors, got "
        f"{in_words(limits, short)}: all take their cheapest structures"
    )
    limits = limits | {cost: least[cost] for cost in short}
    return cheapest(sides, limits), limits


def _table(
    matrices: Mapping[WeightMatrix, tuple[CountedCovariances, Options]],
    side: int,
    candidates: Sequence[str],
    agree: Callable[[Sequence[float]], Sequence[float]],
    count: Callable[[WeightMatrix, int, Options, str], float],
) -> list[Option]:
    """The options of one side of the matrices of one weight, which take the same structure."""
    tables = []
    for matrix, (both, options) in matrices.items():
        S, other = (both.S_K, both.S_C.n) if side == 0 else (both.S_C, both.S_K.n)
        flops = functools.partial(count, matrix, side, options)
        tables.append(options_of(S, other, candidates, flops))
    together = [functools.reduce(operator.add, same) for same in zip(*tables, strict=True)]
    told = agree([option.nats for option in together])
    return [replace(o, nats=nats) for o, nats in zip(together, told, strict=True)]


class _Counted:
    """Operations in a step of a side beside a scaled identity: its own, and a few for each number.

    Equal matrices of a group are counted once.
    """

    def __init__(self) -> None:
        self._known: dict[Any, float] = {}

    def __call__(self, matrix: WeightMatrix, side: int, options: Options, spec: str) -> float:
        key = matrix.shape, matrix.weight.dtype, side, id(options), spec
        if key not in self._known:
            both = [parse("scaled_identity")] * 2
            both[side] = parse(spec)
            found = flops_of(InverseFree(), matrix.shape, both, options, matrix.weight.dtype)
            self._known[key] = found.in_step()
        return self._known[key]
