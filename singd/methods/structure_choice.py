"""Structures for every weight within a budget: the ones that lose the fewest nats of its curvature.

Each candidate K of a side has a :func:`structured.divergence` from ``S + 0.001 mean(S) I``, which
counts as often as the other side is long: so many times the factor occurs in the Kronecker product.
Beginning with the cheapest structures everywhere, that exchange is made again and again that saves
the most nats for a number, until the budget is spent.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    """

    spec: str
    numbers: int
    nats: float


@dataclass(frozen=True)
class StructureChoice(Mapping[str, tuple[str, str]]):
    """Structures of K and C by the name of each weight; give it to ``SINGD(structures=...)``.

    Attributes:
        sides: What was chosen for K and C of each weight.
        budget: Numbers that might be stored.
    """

    sides: Mapping[str, tuple[Option, Option]]
    budget: int

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

    @property
    def numbers(self) -> int:
        """How many numbers all factors store."""
        return sum(option.numbers for both in self.sides.values() for option in both)

    @property
    def nats(self) -> float:
        """Nats lost by all structures together."""
        return sum(map(self.nats_of, self.sides))

    def __str__(self) -> str:
        width = max(map(len, self.sides), default=0)
        rows = [
            f"{name:{width}}  {K.spec:22} {C.spec:22} {K.numbers + C.numbers:12,} "
            f"{K.nats + C.nats:12.4g}"
            for name, (K, C) in self.sides.items()
        ]
        head = f"{'weight':{width}}  {'K':22} {'C':22} {'numbers':>12} {'nats lost':>12}"
        total = f"{self.numbers:,} of {self.budget:,} numbers, {self.nats:.4g} nats lost"
        return "\n".join([head, "-" * len(head), *rows, total])


def options_of(S: StructuredMatrix, other: int, candidates: Sequence[str]) -> list[Option]:
    """All candidates for one side.

    Args:
        S: The curvature of the side: a dense member, or the diagonal of a wide side.
        other: Length of the other side.
        candidates: Specs.
    """
    if isinstance(S, Diagonal):
        return [Option("diagonal", S.n, 0.0)]
    M = S.to_dense().double()
    mean = M.diagonal(dim1=-2, dim2=-1).mean(-1)
    added = DAMPING * mean + torch.finfo(torch.float32).tiny
    found = []
    for spec in candidates:
        K = inverse_root(spec, M, added)
        stored = sum(t.numel() for t in K.tensors())
        lost = float(divergence(K, M, added).clamp(min=0.0).sum()) * other
        found.append(Option(spec, stored, lost if lost > NOTHING else 0.0))
    return found


def unbeaten(options: Iterable[Option]) -> list[Option]:
    """The options that no other beats, by numbers, each with fewer nats."""
    best: list[Option] = []
    for option in sorted(options, key=lambda option: (option.numbers, option.nats)):
        if not best or option.nats < best[-1].nats * (1 - 1e-9):
            best.append(option)
    return best


def cheapest_nats(
    sides: Mapping[tuple[str, int], Sequence[Option]], budget: int
) -> dict[tuple[str, int], Option]:
    """The option of each side, by exchanges that save the most nats for a number."""
    chosen = dict.fromkeys(sides, 0)
    spent = sum(options[0].numbers for options in sides.values())
    if spent > budget:
        raise ValueError(f"budget: expected at least {spent:,} numbers, got {budget:,}")
    waiting: list[tuple[float, tuple[str, int], int, int]] = []

    def offer(side: tuple[str, int]) -> None:
        """The best exchange of this side, by nats saved for a number."""
        options, now = sides[side], chosen[side]
        rates = [
            ((options[now].nats - o.nats) / (o.numbers - options[now].numbers), i)
            for i, o in enumerate(options[now + 1 :], now + 1)
            if spent - options[now].numbers + o.numbers <= budget
        ]
        if rates:
            rate, target = max(rates)
            heapq.heappush(waiting, (-rate, side, now, target))

    for side in sides:
        offer(side)
    while waiting:
        _, side, before, target = heapq.heappop(waiting)
        if before != chosen[side]:
            continue
        more = sides[side][target].numbers - sides[side][before].numbers
        if spent + more <= budget:
            spent, chosen[side] = spent + more, target
        offer(side)
    return {side: sides[side][i] for side, i in chosen.items()}


# The budget --------------------------------------------------------------------------------------


def check_budget(budget: Any) -> None:
    """Raise ``ValueError`` unless it is a multiple or a number of bytes."""
    good = isinstance(budget, int | float) and not isinstance(budget, bool) and budget > 0
    if not good or not math.isfinite(budget) or (isinstance(budget, int) and budget < 1000):
        raise ValueError(
            "budget: expected a multiple of AdamW's state (a float) or bytes (an integer of 1000 "
            f"or more), got {budget!r}"
        )
