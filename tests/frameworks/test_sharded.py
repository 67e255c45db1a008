"""FSDP2 by accelerate and by Lightning ends where one process ends."""

from __future__ import annotations

import socket
from pathlib import Path

import torch

from tests.frameworks import sharded
from tests.sharded.test_recipes import end, start


def test_both_frameworks_end_where_one_process_ends(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    assert end(start(sharded.worker, 2, str(tmp_path), port)) == [0, 0]
    expected = sharded.alone()
    for rank in range(2):
        for name, weights in torch.load(tmp_path / str(rank)).items():
            for key, value in expected.items():
                torch.testing.assert_close(
                    weights[key], value, rtol=1e-4, atol=1e-5, msg=f"{name}: {key}"
                )
