"""Training of sharded models ends where one process ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from singd.testing import check_sharded
from singd.testing.sharded import compare
from singd.testing.sharded.rows import TOLERANCES
from singd.testing.sharded.world import Ended
from tests.one_rank import one_rank
from tests.sharded import (
    checkpoints,
    frozen,
    kit,
    parallel,
    scenarios,
    shards,
    stages,
    structures,
    traffic,
)

FROZEN, SCENARIOS = frozen.cases(), scenarios.cases()
STRUCTURES, TRAFFIC, STAGES = structures.cases(), traffic.cases(), stages.cases()
CHECKPOINTS, PARALLEL = checkpoints.cases(), parallel.cases()
KIT, FAULTS, SHARDS = kit.cases(), kit.faults(), shards.cases()
BOUNDS = {row.__name__: bound for row, bound in TOLERANCES.items()}


@pytest.fixture(scope="module", autouse=True)
def _one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Models may be sharded here, over a mesh of one."""
    with one_rank(tmp_path_factory.mktemp("one")):
        yield


def check(name: str, ended: list[Ended], expected: Any, tolerance: float = 1e-10) -> None:
    """Raise ``AssertionError`` unless all ranks ended as expected."""
    fault = compare([each[name] for each in ended], expected, tolerance)
    assert not fault, fault


@pytest.mark.filterwarnings("ignore")  # those are tested elsewhere
@pytest.mark.parametrize("name", FROZEN)
def test_a_configuration(name: str, ended: list[Ended]) -> None:
    check(name, ended, frozen.alone(*FROZEN[name][1:]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario(name: str, ended: list[Ended]) -> None:
    layout, scenario = SCENARIOS[name][1:]
    tolerance = scenarios.TOLERANCES.get(scenario, 1e-10)
    check(name, ended, scenarios.alone(layout, scenario), tolerance)


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_and_places(name: str, ended: list[Ended]) -> None:
    check(name, ended, structures.alone(*STRUCTURES[name][1:]))


@pytest.mark.parametrize("name", TRAFFIC)
def test_the_plan_says_what_is_sent(name: str, ended: list[Ended]) -> None:
    expected = traffic.EXPECTED.get(TRAFFIC[name][2], {"sent": torch.zeros(())})
    check(name, ended, expected)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint(name: str, ended: list[Ended]) -> None:
    check(name, ended, checkpoints.alone(*CHECKPOINTS[name][1:]))


@pytest.mark.parametrize("name", PARALLEL)
def test_tensor_parallelism(name: str, ended: list[Ended]) -> None:
    check(name, ended, parallel.alone(*PARALLEL[name][1:]))


@pytest.mark.parametrize("name", SHARDS)
def test_factors_of_shards(name: str, ended: list[Ended]) -> None:
    check(name, ended, shards.alone(*SHARDS[name]))


@pytest.mark.parametrize("name", STAGES)
def test_stages_of_a_pipeline(name: str, ended: list[Ended]) -> None:
    check(name, ended, {} if "without" in name else stages.alone())


@pytest.mark.parametrize("name", KIT)
def test_a_row_of_the_kit(name: str, ended: list[Ended]) -> None:
    layout, method, row = KIT[name][1:]
    tolerance = 0.0 if method == kit.EXACT else BOUNDS.get(row, 1e-10)
    check(name, ended, kit.alone(layout, method, row), tolerance)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_fails_its_row(name: str, ended: list[Ended]) -> None:
    layout, fault, row = FAULTS[name][1:]
    right = kit.alone(layout, kit.RIGHT.get(fault, "SINGD"), row)
    with pytest.raises(AssertionError, match=r"differs|other tensors"):
        check(name, ended, right, BOUNDS.get(row, 1e-9))


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters())


def test_the_kit() -> None:
    """By itself, with an optimizer of PyTorch, which takes unreduced gradients as they are."""
    check_sharded(adamw, rows=["uneven_shares", "noise"])
    with pytest.raises(AssertionError, match=r"row 'parameters_.*' fails: .* differs"):
        check_sharded(adamw, rows=["parameters_that_are_not_sharded"])
    with pytest.raises(ValueError, match=r"expected rows among uneven_shares, .*, got 'rows'"):
        check_sharded(adamw, rows=["rows"])
