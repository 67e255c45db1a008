"""A process killed at any moment resumes exactly, with the recipe of the documentation."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from pathlib import Path

import torch

from tests.singd.killed import STEPS, child, train

KILLS = 8


def test_a_run_that_is_killed_ends_as_one_that_is_not(tmp_path: Path) -> None:
    (tmp_path / "undisturbed").mkdir()
    expected = train(str(tmp_path / "undisturbed"))
    context = multiprocessing.get_context("forkserver")  # imports torch once
    context.set_forkserver_preload(["tests.singd.killed"])
    chance, codes, steps = random.Random(), [], []
    while len(codes) <= KILLS:
        said = context.Semaphore(0)
        process = context.Process(target=child, args=(str(tmp_path), said))
        process.start()
        if len(codes) < KILLS:  # within a save, or within the steps that follow
            for _ in range(chance.randint(2, 4)):
                assert said.acquire(timeout=60)
            time.sleep(chance.choice([0.002, 0.02]) * chance.random())
            process.kill()
        process.join(120)
        codes.append(process.exitcode)
        if (tmp_path / "run.pt").exists():
            steps.append(torch.load(tmp_path / "run.pt")["step"])
    assert codes == [-signal.SIGKILL] * KILLS + [0]
    assert steps == sorted(steps)
    assert 0 < steps[0] < steps[KILLS - 1] < steps[KILLS] == STEPS
    assert torch.load(tmp_path / "ended") == expected
