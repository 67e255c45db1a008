"""State, traffic and added time of a step, by method, on the rank that has most."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.scale.models import Assumptions, Matrix
from benchmarks.scale.work import Factors, Work, factors_of
from singd.placement.places import Demand, Machine, choose, owners

MOMENTUM, ADAMW = 2.5, 3.5  # numbers read and written for a parameter, over two
NORMS = 8.0  # bytes of what grafting stores of the norms of a matrix, on every rank
NOTHING = Work()
HOUSEKEEPING = 4  # small collectives of every step: who has gradients, norms, whether all is finite


@dataclass(frozen=True)
class Estimate:
    """What a method adds to a step.

    Attributes:
        state: Bytes kept between steps on the rank with most; parameters and gradients not counted.
        buffers: Bytes of statistics after a backward pass before an update, but for what is sent to
            owners before.
        sent: Bytes that a rank sends in a step, on average over ranks and steps.
        work: Of the rank with most, on average over steps.
        collectives: Number of collectives in a step, on average.
        places: Share of the numbers in matrices by place.
    """

    state: float
    buffers: float = 0.0
    sent: float = 0.0
    work: Work = NOTHING
    collectives: float = 0.0
    places: str = ""

    def seconds(self, given: Assumptions) -> float:
        traffic = self.sent / given.bandwidth + self.collectives * given.latency
        return self.work.seconds(given) + traffic


@dataclass(frozen=True, eq=False)
class Weight:
    """One weight of the model, as the library's placement knows it."""

    matrix: Matrix
    name: str

    @property
    def key(self) -> str:
        return self.name


def weights(matrices: Sequence[Matrix]) -> list[Weight]:
    """Every weight of the model."""
    return [Weight(m, f"{i}.{m.name}") for m in matrices for i in range(m.count)]


def adamw(numbers: float, ranks: int) -> Estimate:
    """Two averages, sharded."""
    return Estimate(8 * numbers / ranks, work=Work(0.0, ADAMW * numbers / ranks))


def has_rows(matrix: Matrix, mixed: int | None, ranks: int) -> bool:
    """Whether the rows of every rank are whole blocks."""
    each = -(-matrix.rows // ranks)
    ends = [min(matrix.rows, each * (rank + 1)) for rank in range(ranks)]
    return mixed is not None and all(end % mixed == 0 or end == matrix.rows for end in ends)


def demand(matrix: Matrix, factors: Factors, given: Assumptions, ranks: int) -> Demand:
    """What the library's placement is told."""
    return Demand(
        numbers=matrix.numbers,
        statistics=4 * factors.sent,
        itemsize=4,
        apply=2 * factors.apply.products,
        update=2 * factors.update.products,
        interval=given.interval,
        needs_factors=factors.needs_factors,
        is_split=True,
        mixed_rows=factors.mixed_rows,
        has_rows=has_rows(matrix, factors.mixed_rows, ranks),
        separable=factors.separable,
        scattered=4 * factors.statistics_grad if factors.separable else 0,
        unscattered=4 * factors.sent_grad if factors.separable else 0,
        update_grad=0.0,
    )


def singd(
    matrices: Sequence[Matrix],
    ranks: int,
    rows: float,
    given: Assumptions,
    options: Mapping[str, Any],
    places: str | None = None,
) -> Estimate:
    """SINGD with momentum, by the places that the library chooses.

    Args:
        matrices: Weights, as split by tensor parallelism.
        ranks: Number of ranks that share each of them.
        rows: Tokens that a rank sees in a step.
        given: Assumptions.
        options: Options of :class:`singd.SINGD` that are not its defaults.
        places: One place for all; the cheapest if ``None``.
    """
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[given.itemsize]
    of = {m.name: factors_of(m, dict(options), dtype) for m in matrices}
    every = weights(matrices)
    demands: Any = {w: demand(w.matrix, of[w.matrix.name], given, ranks) for w in every}
    machine = Machine(given.bandwidth, given.speed, given.latency)
    place = choose(demands, places, ranks, machine)
    owner = owners({w: d for w, d in demands.items() if place[w] == "owned"}, ranks, {})
    names = {w.matrix.name: w.matrix for w in every if place[w] == "rows"}
    shared_of = {
        name: factors_of(m, dict(options), dtype, -(-m.rows // ranks))
        for name, m in names.items()
        if of[name].separable
    }
    T, ring = given.interval, (ranks - 1) / ranks
    state, loads, own = [0.0] * ranks, [Work()] * ranks, [0.0] * ranks
    common, kept, buffers, sent = Work(), NORMS * len(every), 0.0, 0.0
    for w in every:
        f, P = of[w.matrix.name], w.matrix.numbers
        held = (f.stored + f.cached) * given.itemsize
        common += f.row * (rows / T / given.sample) + Work(0.0, MOMENTUM * P / ranks)
        reduced = 4 * f.sent * ring / T
        if place[w] == "owned":
            state[owner[w]] += held
            own[owner[w]] += 4 * f.statistics
            loads[owner[w]] += f.apply + f.update * (1 / T)
            sent += 2 * 4 * P * ring / ranks + reduced
            continue
        buffers += 4 * f.statistics
        if place[w] == "rows" and f.separable:
            part = shared_of[w.matrix.name]
            kept += (part.stored + part.cached) * given.itemsize
            common += part.apply + part.update * (1 / T)
            scattered = ranks * part.statistics_grad  # as many for every rank as for the first
            sent += 4 * ring / T * (2 * (f.sent - f.sent_grad) + scattered)
            continue
        kept += held
        shared = ranks if place[w] in ("rows", "columns") else 1
        common += f.apply * (1 / shared) + f.update * (1 / T)
        gradient = {"rows": 0.0, "columns": 2 * P * ring / ranks, "everywhere": P * ring}[place[w]]
        sent += 4 * gradient + 2 * reduced
    used = {place[w] for w in every}
    packs = sum(of[w.matrix.name].sent for w in every) / (1 << 24) + 1
    collectives = HOUSEKEEPING + packs / T
    collectives += 2 if "columns" in used else 0
    collectives += 1 if "everywhere" in used else 0
    collectives += 2 + ranks / T if "owned" in used else 0
    numbers = sum(m.count * m.numbers for m in matrices)
    busiest = max(loads, key=lambda work: work.seconds(given))
    return Estimate(
        state=4 * numbers / ranks + kept + max(state),
        buffers=buffers + max(own),
        sent=sent,
        work=common + busiest,
        collectives=collectives if ranks > 1 else 0.0,
        places=said(place),
    )


def said(place: Mapping[Any, str]) -> str:
    """The places in use, by the share of the numbers that are there."""
    shares: dict[str, int] = {}
    for w, where in place.items():
        shares[where] = shares.get(where, 0) + w.matrix.numbers
    total = sum(shares.values())
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{where} {100 * n / total:.0f}%" for where, n in ordered)


# Others ------------------------------------------------------------------------------------------


def balanced(
    matrices: Sequence[Matrix], ranks: int, work: Mapping[str, Work], given: Assumptions
) -> tuple[Work, list[list[Matrix]]]:
    """The work of the busiest of ranks that own matrices, and what every rank owns."""
    loads, owned = [Work()] * ranks, [list[Matrix]() for _ in range(ranks)]
    ordered = sorted(weights(matrices), key=lambda w: -work[w.matrix.name].seconds(given))
    times = [0.0] * ranks
    for w in ordered:
        rank = times.index(min(times))
        times[rank] += work[w.matrix.name].seconds(given)
        loads[rank] += work[w.matrix.name]
        owned[rank].append(w.matrix)
    return max(loads, key=lambda load: load.seconds(given)), owned


def exchanged(numbers: float, ranks: int) -> float:
    """Bytes that a rank sends: gradients to owners, and directions back."""
    return 2 * 4 * numbers * (ranks - 1) / ranks / ranks


def muon(matrices: Sequence[Matrix], ranks: int, rows: float, given: Assumptions) -> Estimate:
    """Five Newton-Schulz iterations on one rank for each matrix (Jordan et al., 2024)."""
    work = {}
    for m in matrices:
        a, b = min(m.rows, m.columns), max(m.rows, m.columns)
        work[m.name] = Work(5 * (2.0 * a * a * b + a**3), 10.0 * m.numbers)
    numbers = sum(m.count * m.numbers for m in matrices)
    busiest, _ = balanced(matrices, ranks, work, given)
    shared = Work(0.0, MOMENTUM * numbers / ranks)
    sent = exchanged(numbers, ranks)
    return Estimate(
        4 * numbers / ranks,
        sent=sent,
        work=shared + busiest,
        collectives=HOUSEKEEPING + 2,
    )


def shampoo(matrices: Sequence[Matrix], ranks: int, rows: float, given: Assumptions) -> Estimate:
    """Blocks of at most ``largest``, each with statistics, roots, and AdamW's norm beside.

    Source: Shi et al., "A Distributed Data-Parallel PyTorch Implementation of Distributed Shampoo",
    arXiv 2309.06497; statistics in every step.
    """
    work, held = {}, {}
    for m in matrices:
        n, k = (min(size, given.largest) for size in (m.rows, m.columns))
        blocks = math.ceil(m.rows / n) * math.ceil(m.columns / k)
        products = float(n * n * k + n * k * k)  # the statistics, and the direction again
        roots = given.root * (n**3 + k**3) / given.interval
        work[m.name] = Work(blocks * (2 * products + roots), 4.0 * m.numbers)
        held[m.name] = 4.0 * blocks * 2 * (n * n + k * k)
    return owned_factors(matrices, ranks, given, work, held, 8.0)


def soap(matrices: Sequence[Matrix], ranks: int, rows: float, given: Assumptions) -> Estimate:
    """AdamW in the eigenbases of both sides; sides beyond ``largest`` have none.

    Source: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", arXiv 2409.11321.
    """
    work, held = {}, {}
    for m in matrices:
        sides = [n for n in (m.rows, m.columns) if n <= given.largest]
        products = sum(4.0 * n * m.numbers for n in sides)  # statistics, there, back, and momentum
        bases = sum(given.basis * n**3 for n in sides) / given.interval
        work[m.name] = Work(products + bases, ADAMW * m.numbers)
        held[m.name] = 4.0 * sum(2 * n * n for n in sides)
    return owned_factors(matrices, ranks, given, work, held, 8.0)


def owned_factors(
    matrices: Sequence[Matrix],
    ranks: int,
    given: Assumptions,
    work: Mapping[str, Work],
    held: Mapping[str, float],
    sharded: float,
) -> Estimate:
    """A method whose factors are on one rank for each matrix.

    Args:
        matrices: Weights.
        ranks: Number of ranks.
        given: Assumptions.
        work: Of each matrix in a step, by name.
        held: Bytes of its factors, by name.
        sharded: Bytes that are kept of every number of a weight beside.
    """
    busiest, owned = balanced(matrices, ranks, work, given)
    numbers = sum(m.count * m.numbers for m in matrices)
    most = max(sum(held[m.name] for m in own) for own in owned)
    shared = Work(0.0, MOMENTUM * numbers / ranks)
    sent = exchanged(numbers, ranks)
    return Estimate(
        sharded * numbers / ranks + most,
        sent=sent,
        work=shared + busiest,
        collectives=HOUSEKEEPING + 2,
    )
