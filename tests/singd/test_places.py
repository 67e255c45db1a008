"""Where factors of sharded matrices are worked on, by what each place costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from singd.placement.places import PLACES, Demand, Machine, check_places, choose, owners, seconds

WIDE = Demand(
    numbers=4096 * 4096,
    statistics=4 * 2 * 4096 * 4096,
    itemsize=4,
    apply=4.0 * 4096**3,
    update=12.0 * 4096**3,
    interval=10,
    needs_factors=False,
    is_split=True,
)
DIAGONAL = replace(
    WIDE, statistics=4 * 8192, apply=4.0 * 4096**2, update=12.0 * 4096, mixed_rows=1, has_rows=True
)
SMALL = replace(DIAGONAL, numbers=64, statistics=4 * 16, apply=256.0, update=96.0, has_rows=False)


def matrices(*demands: Demand) -> dict[Any, Demand]:
    return {_Matrix(f"{i}.weight"): d for i, d in enumerate(demands)}


class _Matrix:
    def __init__(self, name: str) -> None:
        self.name = self.key = name


def chosen(demands: dict[Any, Demand], given: Any = None, ranks: int = 8) -> list[str]:
    found = choose(demands, given, ranks)
    return [found[matrix] for matrix in demands]


def test_the_cheapest_place_is_chosen() -> None:
    assert chosen(matrices(*[WIDE] * 16)) == ["owned"] * 16
    assert chosen(matrices(SMALL)) == ["everywhere"]
    assert chosen(matrices(DIAGONAL, *[WIDE] * 16)) == ["rows"] + ["owned"] * 16
    assert chosen(matrices(replace(SMALL, has_rows=True), SMALL)) == ["rows", "everywhere"]
    narrow = replace(WIDE, needs_factors=True)  # no rank may have its factors alone
    assert chosen(matrices(*[narrow] * 16)) == ["columns"] * 16


def test_a_matrix_that_cannot_have_a_place_gets_the_next_best() -> None:
    whitened = replace(WIDE, needs_factors=True)
    whole = replace(whitened, is_split=False)
    demands = matrices(WIDE, whitened, whole, DIAGONAL)
    assert chosen(demands, "owned") == ["owned", "columns", "everywhere", "owned"]
    assert chosen(demands, "rows") == ["columns", "columns", "everywhere", "rows"]
    assert chosen(demands, "columns") == ["columns", "columns", "everywhere", "columns"]


def test_the_first_pattern_that_matches_counts() -> None:
    demands = matrices(*[WIDE] * 3)
    given = {"1.*": "columns", "[01].*": "everywhere"}
    assert chosen(demands, given) == ["everywhere", "columns", chosen(matrices(WIDE))[0]]


@pytest.mark.parametrize("given", ["nowhere", {"*": "here"}])
def test_other_places_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="places: expected one of everywhere, rows, columns"):
        check_places(given)


@pytest.mark.parametrize("place", PLACES)
def test_time_is_that_of_bytes_and_of_operations(place: str) -> None:
    slow, fast = Machine(bandwidth=1.0), Machine(speed=1.0)
    times = [seconds(place, WIDE, 8, 16, machine) for machine in (slow, fast)]
    twice = replace(WIDE, numbers=2 * WIDE.numbers, statistics=2 * WIDE.statistics)
    assert seconds(place, twice, 8, 16, slow) == pytest.approx(2 * times[0])
    busy = replace(WIDE, apply=2 * WIDE.apply, update=2 * WIDE.update)
    assert seconds(place, busy, 8, 16, fast) == pytest.approx(2 * times[1])


def test_owners_have_about_equal_work_and_stay() -> None:
    demands = matrices(*[replace(WIDE, apply=float(i + 1), update=0.0) for i in range(12)])
    found = owners(demands, 3, {})
    loads = [sum(demands[m].apply for m, rank in found.items() if rank == r) for r in range(3)]
    assert max(loads) - min(loads) <= 2  # of 78
    more = {**demands, _Matrix("x"): WIDE}
    again = owners(more, 3, found)
    assert {matrix: again[matrix] for matrix in demands} == found
    assert loads[again[next(m for m in more if m not in demands)]] == min(loads)
