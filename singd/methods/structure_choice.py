"""Structures for every weight within a budget: the ones that lose the fewest nats of its curvature.

Each candidate K of a side has a :func:`structured.divergence` from ``S + 0.001 mean(S) I``, which
counts as often as the other side is long: so many times the factor occurs in the Kronecker product.
Beginning with the cheapest structures everywhere, that exchange is made again and again that saves
the most nats for its price, until no other one is within the limits. With one limit, the price is
what is limited. With more, it is a weighted sum: once with weights that make limits equal, and once
for each limit that counts alone; the best of these choices is taken.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from structured import Diagonal, StructuredMatrix, divergence, inverse_root

CANDIDATES = (
    *("diagonal", "block_diagonal(4)", "block_diagonal(16)", "block_diagonal(64)"),
    *("hierarchical(4, 4)", "hierarchical(16, 16)", "dense"),
)
"""The structures that are compared by default."""

DAMPING = 1e-3
"""Damping of the factors that are compared, in units of the mean eigenvalue."""

NOTHING = 1e-6
"""Nats that count as none: rounding shall not choose between structures that hold all."""


@dataclass(frozen=True)
class Option:
    """One structure of one side of one weight.

    Attributes:
        spec: The structure.
        numbers: How many numbers it stores.
        nats: ``KL`` of the Gaussian with the factor to that with the whole curvature of this side.
        flops: Floating-point operations that it takes in a step.
        sent: Bytes that a rank sends for it in a step, where they are limited.
    """

    spec: str
    numbers: int
    nats: float
    flops: float = 0.0
    sent: float = 0.0

    def __add__(self, other: Option) -> Option:
        """What both take together, with the structure of the first."""
        sums = (getattr(self, f) + getattr(other, f) for f in ("numbers", "nats", "flops", "sent"))
        return Option(self.spec, *sums)


@dataclass(frozen=True)
class StructureChoice(Mapping[str, tuple[str, str]]):
    """Structures of K and C by the name of each weight; give it to ``SINGD(structures=...)``.

    Attributes:
        sides: What was chosen for K and C of each weight.
        limits: What might be used of ``numbers``, and of ``flops`` if they are limited. Bytes sent
            are shown by :meth:`singd.SINGD.plan`: they depend on all structures together.
    """

    sides: Mapping[str, tuple[Option, Option]]
    limits: Mapping[str, float]

    def __getitem__(self, name: str) -> tuple[str, str]:
        K, C = self.sides[name]
        return K.spec, C.spec

    def __iter__(self) -> Iterator[str]:
        return iter(self.sides)

    def __len__(self) -> int:
        return len(self.sides)

    def nats_of(self, name: str) -> float:
        """Nats lost by the structures of one weight."""
        K, C = self.sides[name]
        return K.nats + C.nats

    def used(self, cost: str) -> float:
        """What all factors take of ``numbers``, of ``flops`` or of ``nats``."""
        return sum(getattr(option, cost) for both in self.sides.values() for option in both)

    @property
    def numbers(self) -> int:
        """How many numbers all factors store."""
        return int(self.used("numbers"))

    @property
    def nats(self) -> float:
        """Nats lost by all structures together."""
        return self.used("nats")

    def __str__(self) -> str:
        width = max(map(len, self.sides), default=0)
        head = f"{'weight':{width}}  {'K':22} {'C':22} "
        head += "".join(f"{cost:>12} " for cost in self.limits) + f"{'nats lost':>12}"
        rows = [
            f"{name:{width}}  {K.spec:22} {C.spec:22} "
            + "".join(f"{getattr(K + C, cost):12,.0f} " for cost in self.limits)
            + f"{K.nats + C.nats:12.4g}"
            for name, (K, C) in self.sides.items()
        ]
        used = [f"{self.used(cost):,.0f} of {top:,.0f} {cost}" for cost, top in self.limits.items()]
        total = ", ".join([*used, f"{self.nats:.4g} nats lost"])
        return "\n".join([head, "-" * len(head), *rows, total])


def options_of(
    S: StructuredMatrix, other: int, candidates: Sequence[str], flops: Callable[[str], float]
) -> list[Option]:
    """All candidates for one side.

    Args:
        S: The curvature of the side: a dense member, or the diagonal of a wide side.
        other: Length of the other side.
        candidates: Specs.
        flops: Floating-point operations in a step that a spec takes.
    """
    if isinstance(S, Diagonal):
        return [Option("diagonal", S.n, 0.0, flops("diagonal"))]
    M = S.to_dense().double()
    mean = M.diagonal(dim1=-2, dim2=-1).mean(-1)
    added = DAMPING * mean + torch.finfo(torch.float32).tiny
    found = []
    for spec in candidates:
        K = inverse_root(spec, M, added)
        stored = sum(t.numel() for t in K.tensors())
        lost = float(divergence(K, M, added).clamp(min=0.0).sum()) * other
        found.append(Option(spec, stored, lost if lost > NOTHING else 0.0, flops(spec)))
    return found


Sides = Mapping[tuple[str, int], Sequence[Option]]
Chosen = dict[tuple[str, int], Option]


def cheapest(sides: Sides, limits: Mapping[str, float]) -> Chosen:
    """The option of each side that takes the least, where limits count alike."""

    def price(option: Option) -> tuple[float, float]:
        return _price(option, {cost: 1 / max(top, 1) for cost, top in limits.items()}), option.nats

    return {side: min(options, key=price) for side, options in sides.items()}


def needed(chosen: Chosen, costs: Iterable[str]) -> dict[str, float]:
    """What is used of each cost."""
    return {cost: sum(getattr(option, cost) for option in chosen.values()) for cost in costs}


def in_words(amounts: Mapping[str, float], costs: Iterable[str]) -> str:
    """Amounts of costs in words."""
    return " and ".join(f"{amounts[cost]:,.0f} {cost}" for cost in costs)


def fewest_nats(sides: Sides, limits: Mapping[str, float]) -> Chosen:
    """The option of each side, by exchanges that save the most nats for their price.

    Of any choice let its shares of the limits be added up: none loses fewer nats whose sum is at
    most 1 less that of the largest option. With one limit that is the optimum but for one exchange.

    Args:
        sides: The options of every side.
        limits: What may be used of attributes of options, such as ``numbers``.

    Raises:
        ValueError: If not even the cheapest options are within the limits.
    """
    first = cheapest(sides, limits)
    least = needed(first, limits)
    short = [cost for cost, top in limits.items() if top < least[cost]]
    if short:
        raise ValueError(
            f"budget: expected at least {in_words(least, short)}, got {in_words(limits, short)}"
        )
    together = {cost: 1 / max(top, 1) for cost, top in limits.items()}
    alone = [{cost: weight} for cost, weight in together.items()] if len(limits) > 1 else []
    found = [_exchanged(sides, dict(first), limits, weights) for weights in (together, *alone)]
    return min(found, key=lambda chosen: sum(option.nats for option in chosen.values()))


def _price(option: Option, weights: Mapping[str, float]) -> float:
    return sum(weight * getattr(option, cost) for cost, weight in weights.items())


def _exchanged(
    sides: Sides, chosen: Chosen, limits: Mapping[str, float], weights: Mapping[str, float]
) -> Chosen:
    """What is chosen after all exchanges that are within the limits."""
    spent = needed(chosen, limits)
    waiting: list[tuple[float, tuple[str, int], Option, Option]] = []

    def fits(now: Option, new: Option) -> bool:
        return all(
            spent[cost] - getattr(now, cost) + getattr(new, cost) <= top
            for cost, top in limits.items()
        )

    def offer(side: tuple[str, int]) -> None:
        """The best exchange of this side, by nats saved for its price."""
        now, rates = chosen[side], []
        for new in sides[side]:
            if new.nats < now.nats * (1 - 1e-9) and fits(now, new):
                more = _price(new, weights) - _price(now, weights)
                rate = (now.nats - new.nats) / more if more > 0 else math.inf
                rates.append((rate, now.nats - new.nats, new))
        if rates:
            rate, _, target = max(rates, key=lambda each: each[:2])
            heapq.heappush(waiting, (-rate, side, now, target))

    for side in sides:
        offer(side)
    while waiting:
        _, side, now, target = heapq.heappop(waiting)
        if fits(now, target):
            chosen[side] = target
            for cost in limits:
                spent[cost] += getattr(target, cost) - getattr(now, cost)
        offer(side)
    return chosen
