"""The kernels compile for a Hopper GPU, and use what it has; no GPU is needed for that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_for_hopper(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.compiled"]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout)
    product = found.pop("symmetric product")
    assert product["matrix units"]
    assert product["pipelined"]
    kernels = {"sums of squares", "stochastic rounding", "inner product", "momentum step"}
    assert found.keys() == kernels
    assert all(kernel["wide loads"] for kernel in found.values()), found
