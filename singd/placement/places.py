"""Where the factors of a sharded matrix are worked on, chosen by what each place costs.

With ``P`` numbers in a matrix, ``S`` in its statistics (half of a symmetric matrix), ``W`` ranks
and T steps between updates, a rank sends and receives these numbers in a step, and does this share
of the work:

==============  =====================  ===============  ===================================
place           traffic                factors held on  work of a rank
==============  =====================  ===============  ===================================
``everywhere``  ``P + 2 S / T``        all ranks        all
``rows``        ``2 S_K + S_C / T``    K on all ranks   updates of K, and 1 / W of the rest
``columns``     ``2 P / W + 2 S / T``  all ranks        updates, and 1 / W of directions
``owned``       ``2 P / W + S / T``    one rank         that of its own matrices
``shards``      that of a shard        a shard          that of a shard
==============  =====================  ===============  ===================================

``everywhere`` gathers gradients. ``rows`` leaves them where they are: it is for a C that is
diagonal, or of blocks that end where the rows of ranks do; a rank has the blocks of its rows.
``columns`` multiplies rows of a gradient with K, exchanges rows for columns, and multiplies those
with C. ``owned`` sends every gradient to the one rank that has its factors, and directions back.
``shards`` is for a side that tensor parallelism splits, see :mod:`singd.placement.shards`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from singd.capture.weight_matrix import WeightMatrix
from singd.methods.options import by_name

PLACES = ("everywhere", "rows", "columns", "owned", "shards")

COMPARED = PLACES[:-1]
"""Those that are compared by what they cost: the other is for tensor parallelism."""

INSTEAD = {
    "everywhere": ("everywhere",),
    "rows": ("rows", "columns", "everywhere"),
    "columns": ("columns", "everywhere"),
    "owned": ("owned", "rows", "columns", "everywhere"),
}
"""Each place, and those instead that a matrix gets which cannot have it."""


@dataclass(frozen=True)
class Demand:
    """What the factors of one matrix need.

    Attributes:
        numbers: Numbers in the matrix.
        statistics: Bytes of its statistics, as they are sent.
        itemsize: Bytes of a number in its gradient.
        apply: Floating-point operations of a direction.
        update: Those of an update of the factors.
        interval: Steps between two updates.
        needs_factors: Whether statistics cannot be summed without the factors.
        is_split: Whether a direction is made by a product with each factor.
        mixed_rows: How many neighbouring rows a direction mixes; ``None`` for all.
        has_rows: Whether the rows of every rank are so many, or multiples.
        separable: How many rows are whole blocks of the output factor, of which ranks may then
            have those of their rows; ``None`` if they must have all.
        scattered: Bytes of the statistics of those blocks.
        unscattered: Bytes of the same as they are sent where all ranks have them.
        update_grad: Operations of their update.
        blocks: How many neighbouring inputs, and outputs, are whole blocks of their factor where
            statistics are of some of them alone; ``None`` if there are no such blocks.
        sides: Bytes of the statistics of inputs and of output gradients.
    """

    numbers: int
    statistics: int
    itemsize: int
    apply: float
    update: float
    interval: int
    needs_factors: bool
    is_split: bool
    mixed_rows: int | None = None
    has_rows: bool = False
    separable: int | None = None
    scattered: int = 0
    unscattered: int = 0
    update_grad: float = 0.0
    blocks: tuple[int | None, int | None] = (None, None)
    sides: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Machine:
    """What times are estimated by.

    Attributes:
        bandwidth: Bytes a second that a rank sends.
        speed: Floating-point operations a second.
        latency: Seconds that a collective takes at least.
    """

    bandwidth: float = 50e9
    speed: float = 200e12
    latency: float = 2e-5


def seconds(place: str, demand: Demand, ranks: int, count: int, machine: Machine) -> float:
    """Estimated time that a step takes longer by one matrix, without latencies.

    Args:
        place: One of :data:`PLACES`.
        demand: What the matrix needs.
        ranks: Number of ranks.
        count: Number of matrices that ranks may share.
        machine: What times are estimated by.
    """
    d, T = demand, demand.interval
    whole, part = d.numbers * d.itemsize, 2 * d.numbers * d.itemsize / ranks
    if place == "everywhere":
        sent, work = whole + 2 * d.statistics / T, d.apply + d.update / T
    elif place == "rows":
        sent = (2 * (d.statistics - d.unscattered) + d.scattered) / T
        update = d.update - d.update_grad * (1 - 1 / ranks)
        work = d.apply / ranks + update / T
    elif place == "columns":
        sent, work = part + 2 * d.statistics / T, d.apply / ranks + d.update / T
    else:
        sent = part + d.statistics / T
        work = (d.apply + d.update / T) / min(ranks, count)
    return sent / machine.bandwidth + work / machine.speed


def choose(
    demands: Mapping[WeightMatrix, Demand],
    given: Any,
    ranks: int,
    machine: Machine = Machine(),
) -> dict[WeightMatrix, str]:
    """The place of every matrix.

    Args:
        demands: What the factors of each matrix need, of all that may have any place.
        given: A place for all; or places by patterns of parameter names; the cheapest if ``None``.
        ranks: Number of ranks.
        machine: What times are estimated by.
    """
    found: dict[WeightMatrix, str] = {}
    free = {}
    for matrix, demand in demands.items():
        wanted = by_name(given, matrix.name)
        if wanted in (None, "shards"):
            free[matrix] = demand
        else:
            found[matrix] = _fitting(wanted, demand)
    for matrix, demand in [(m, d) for m, d in free.items() if d.has_rows]:
        times = {p: seconds(p, demand, ranks, len(free), machine) for p in COMPARED}
        if times["rows"] <= min(t for p, t in times.items() if _may_have(p, demand)):
            found[matrix] = "rows"  # which has no latency in most steps
    free = {matrix: demand for matrix, demand in free.items() if matrix not in found}
    updates = max((1.0 / demand.interval for demand in free.values()), default=1.0)
    latencies = {"everywhere": 2.0, "columns": 3.0, "owned": 2.0 + ranks * updates}

    def total(place: str) -> float:
        times = [
            seconds(_fitting(place, demand), demand, ranks, len(free), machine)
            for demand in free.values()
        ]
        return sum(times) + latencies[place] * machine.latency

    best = min(latencies, key=total)
    instead = "rows" if best in ("everywhere", "columns") else best  # which sends less
    for matrix, demand in free.items():
        found[matrix] = instead if _may_have(instead, demand) else _fitting(best, demand)
    return found


def _may_have(place: str, demand: Demand) -> bool:
    """Whether a matrix can have a place."""
    return {
        "everywhere": True,
        "rows": demand.has_rows,
        "columns": demand.is_split,
        "owned": not demand.needs_factors,
    }[place]


def _fitting(place: str, demand: Demand) -> str:
    """A place, or the next best one that a matrix can have."""
    return next(each for each in INSTEAD[place] if _may_have(each, demand))


def owners(
    demands: Mapping[WeightMatrix, Demand], ranks: int, before: Mapping[WeightMatrix, int]
) -> dict[WeightMatrix, int]:
    """The rank that owns each matrix: the one with the least work so far, the largest first.

    Owners of ``before`` are fixed.
    """

    def work(demand: Demand) -> float:
        return demand.apply + demand.update / demand.interval

    loads = [0.0] * ranks
    for matrix, rank in before.items():
        if matrix in demands:
            loads[rank] += work(demands[matrix])
    found = {matrix: before[matrix] for matrix in demands if matrix in before}
    left: Iterable[WeightMatrix] = (matrix for matrix in demands if matrix not in before)
    for matrix in sorted(left, key=lambda m: (-work(demands[m]), m.key)):
        rank = loads.index(min(loads))
        loads[rank] += work(demands[matrix])
        found[matrix] = rank
    return found


def check_places(given: Any) -> None:
    """Raise ``ValueError`` unless it is a place, or places by patterns, or ``None``."""
    for place in given.values() if isinstance(given, Mapping) else [given]:
        if place is not None and place not in PLACES:
            raise ValueError(f"places: expected one of {', '.join(PLACES)}, got {place!r}")
