"""Training under FSDP2 and HSDP ends where one process ends."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.sharded import frozen, scenarios
from tests.sharded.layouts import layouts
from tests.sharded.world import Ended, run
from tests.singd.runs import distance


@pytest.fixture(autouse=True)
def _one_rank(tmp_path: Path) -> Iterator[None]:
    """Models may be sharded here, over a mesh of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def faults(name: str, ended: list[Ended], expected: Any, tolerance: float) -> str:
    """What is wrong with a case; nothing if it ended as expected on every rank."""
    for rank, each in enumerate(ended):
        if isinstance(each[name], str):
            return f"{name}, rank {rank}: {each[name]}"
        others = sorted(each[name].keys() ^ expected.keys())
        if others:
            return f"{name}, rank {rank}: {len(others)} other tensors, {others[:4]}"
        if distance(each[name], ended[0][name]) != 0.0:
            return f"{name}: ranks 0 and {rank} ended differently"
    error = distance(ended[0][name], expected)
    return f"{name}: differs by {error:.1e}" if not error <= tolerance else ""


def test_training_ends_where_one_process_does(tmp_path: Path) -> None:
    cases = {**frozen.cases(), **scenarios.cases()}
    ended = run(tmp_path, layouts, cases)
    found = []
    for name, (function, *args) in cases.items():
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            of_frozen = function is frozen.sharded
            expected = frozen.alone(args[1]) if of_frozen else scenarios.alone(*args)
        tolerance = 1e-10 if of_frozen else scenarios.TOLERANCES.get(args[1], 1e-10)
        found.append(faults(name, ended, expected, tolerance))
    assert not any(found), "\n".join(filter(None, found))
