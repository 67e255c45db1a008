"""Training of sharded models ends where one process ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.sharded import checkpoints, frozen, parallel, scenarios
from tests.sharded.world import Ended
from tests.singd.runs import distance

FROZEN, SCENARIOS = frozen.cases(), scenarios.cases()
CHECKPOINTS, PARALLEL = checkpoints.cases(), parallel.cases()


@pytest.fixture(autouse=True)
def _one_rank(tmp_path: Path) -> Iterator[None]:
    """Models may be sharded here, over a mesh of one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def check(name: str, ended: list[Ended], expected: Any, tolerance: float = 1e-10) -> None:
    """Raise ``AssertionError`` unless all ranks ended as expected."""
    for rank, each in enumerate(ended):
        assert not isinstance(each[name], str), f"rank {rank}: {each[name]}"
        others = sorted(each[name].keys() ^ expected.keys())
        assert not others, f"rank {rank}: {len(others)} other tensors, {others[:4]}"
        assert distance(each[name], ended[0][name]) == 0.0, f"ranks 0 and {rank} differ"
    assert distance(ended[0][name], expected) <= tolerance


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


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint(name: str, ended: list[Ended]) -> None:
    check(name, ended, checkpoints.alone(*CHECKPOINTS[name][1:]))


@pytest.mark.parametrize("name", PARALLEL)
def test_tensor_parallelism(name: str, ended: list[Ended]) -> None:
    check(name, ended, parallel.alone(*PARALLEL[name][1:]))
