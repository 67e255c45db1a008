"""One world of four ranks runs the cases of all files, and of all processes of pytest."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from singd.testing.sharded.world import Ended, load, run
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
from tests.sharded.layouts import begin

LIMIT = 900  # seconds


@pytest.fixture(scope="session")
def ended(tmp_path_factory: pytest.TempPathFactory) -> list[Ended]:
    """What all cases ended with, on every rank."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "sharded"
    done = Path(folder, "done")
    try:
        folder.mkdir()
    except FileExistsError:  # another process of pytest runs them
        deadline = time.monotonic() + LIMIT
        while not done.exists():
            assert time.monotonic() < deadline, "the ranks were not done in time"
            time.sleep(0.5)
        return load(folder)
    modules = frozen, scenarios, structures, traffic, checkpoints, parallel, shards, stages, kit
    cases = {name: case for module in modules for name, case in module.cases().items()}
    cases |= kit.faults()
    only = os.environ.get("SHARDED_CASES", "")  # to work on some
    cases = {name: case for name, case in cases.items() if re.search(only, name)}
    try:
        return run(folder, begin, cases, limit=LIMIT)
    finally:
        done.touch()
