"""The script of the documentation on ranks, and ranks that are killed while they save."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from singd import SINGD
from singd.testing.sharded import compare
from singd.testing.sharded.rows import snapshot
from singd.testing.sharded.setting import Setting, batches, net
from tests.sharded import recipes

LIMIT = 180  # seconds

CONTEXT = multiprocessing.get_context("forkserver")  # imports torch once
CONTEXT.set_forkserver_preload(["tests.sharded.recipes"])


def start(function: Callable[..., None], ranks: int, *args: Any) -> list[Any]:
    """Processes that call ``function(rank, ranks, *args)``."""
    found = [CONTEXT.Process(target=function, args=(rank, ranks, *args)) for rank in range(ranks)]
    for process in found:
        process.start()
    return found


def end(processes: list[Any]) -> list[int]:
    """Exit codes, once all have ended; once one was killed the others are."""
    deadline = time.monotonic() + LIMIT
    while any(p.is_alive() for p in processes):
        failed = any(p.exitcode not in (None, 0) for p in processes)
        if failed or time.monotonic() > deadline:
            time.sleep(0.5)  # so that others go on as far as they can
            for process in processes:
                process.kill()
        time.sleep(0.05)
    return [p.exitcode for p in processes]


def test_the_script_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    processes = start(environment, 4, str(tmp_path), os.environ["MASTER_PORT"])
    assert end(processes) == [0] * 4
    found = [torch.load(tmp_path / str(rank)) for rank in range(4)]
    losses = {
        name: [sum(ranks) for ranks in zip(*(each[name] for each in found), strict=True)]
        for name in ("fsdp", "hsdp", "places", "two_dimensional", "done", "again")
    }
    for name in ("fsdp", "hsdp", "places", "two_dimensional", "done"):
        assert sum(losses[name][-4:]) < sum(losses[name][:4]), name
    assert sum(losses["again"]) < sum(losses["done"])
    assert found[0]["two_dimensional"] == found[1]["two_dimensional"]  # the same samples
    assert [each["first"] for each in found] == [12] * 4


def environment(rank: int, ranks: int, folder: str, port: str) -> None:
    """What ``torchrun`` sets."""
    os.environ |= {"RANK": f"{rank}", "WORLD_SIZE": f"{ranks}", "MASTER_PORT": port}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    recipes.script(rank, ranks, folder)


def alone() -> dict[str, torch.Tensor]:
    """One process that is never interrupted."""
    setting = Setting(None, 2)
    model = net()
    optimizer = SINGD(model, T=2, burn_in=0)
    for X, y in batches(recipes.STEPS):
        optimizer.zero_grad()
        setting.backward(model, X, y)
        optimizer.step()
    return snapshot(model, optimizer)


def test_ranks_that_are_killed_while_they_save_lose_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    steps = []
    for number, kill in enumerate([*recipes.KILLS, ""]):
        meeting = str(tmp_path / f"meet{number}")
        codes = end(start(recipes.train, 2, str(tmp_path / "run"), meeting, kill))
        if kill:
            assert codes[recipes.KILLS[kill][0]] == -signal.SIGKILL, kill
        else:
            assert codes == [0, 0]
        steps.append(max(int(path.name) for path in (tmp_path / "run").glob("[0-9]" * 8)))
    assert steps == [1, 2, 3, 4, recipes.STEPS]
    assert len(list((tmp_path / "run").glob("*.part"))) < 4  # of kills, some written over since
    assert not compare([torch.load(tmp_path / "run" / "ended")], alone(), 1e-10)
