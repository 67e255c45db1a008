"""The kernels are an addition: without their folders, and without Triton, all is correct."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

CODE = """
import sys
import torch
{before}
import structured, singd
from structured._core import dispatch
from singd.ops import dispatch as ours
assert structured.__file__.startswith({root!r}), structured.__file__
assert {expected}
X = torch.randint(-3, 4, (6, 9)).double()
for spec in ("dense", "diagonal", "block_diagonal(4)", "lower_toeplitz", "hierarchical(2, 2)"):
    A = structured.parse(spec)(6, dtype=torch.float64)
    assert torch.equal(A.project_gram(X).to_dense(), A.project(X @ X.mT).to_dense()), spec
model = torch.nn.Linear(5, 3).bfloat16()
optimizer = singd.SINGD(model)
before = model.weight.clone()
for _ in range(2):
    optimizer.zero_grad()
    model(torch.randn(8, 5).bfloat16()).square().mean().backward()
    optimizer.step()
assert not torch.equal(model.weight, before)
"""


def run(root: Path, before: str, expected: str) -> None:
    code = CODE.format(before=before, root=str(root), expected=expected)
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


def test_without_their_folders(tmp_path: Path) -> None:
    for package in ("structured", "singd"):
        skipped = shutil.ignore_patterns("kernels", "__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=skipped)
    run(tmp_path, "", "dispatch.kernels is None and ours.load_kernels() is None")


def test_without_triton() -> None:
    expected = "dispatch.kernels is not None and ours.load_kernels() is not None"
    hide = "import importlib.util as u; f = u.find_spec; "
    hide += "u.find_spec = lambda n, *a: None if n == 'triton' else f(n, *a)"
    run(ROOT, hide, expected + " and not dispatch.kernels.guard.triton_is_installed()")


def test_kernels_wait_for_a_gpu() -> None:
    code = "import sys, structured, singd; print(*sys.modules)"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {*done.stdout.split()}
    assert "singd.ops.dispatch" in loaded
    assert not loaded & {"structured.kernels.symmetric_product", "singd.ops.kernels"}
