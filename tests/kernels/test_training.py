"""Whole training steps by the kernels, interpreted on the CPU; with some that are broken."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from singd import SINGD, diagnostics
from singd.ops import dispatch
from structured.kernels import guard
from tests.singd.runs import Snapshot, snapshot

pytest.importorskip("triton")
import triton
import triton.language as tl

from singd.ops import kernels


@pytest.fixture
def _kernels_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "DEVICES", {"cpu", "cuda"})
    monkeypatch.setattr(dispatch, "kernels_for", lambda x: dispatch.load_kernels())
    for kernel in kernels.GUARDED:
        monkeypatch.setattr(kernel, "found", {})


def trained(dtype: torch.dtype = torch.float16) -> Snapshot:
    """Not in bfloat16: where numbers become that, Triton's interpreter cuts them off."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).to(dtype)
    optimizer = SINGD(model, lr=0.05, T=2, burn_in=0, weight_decay=0.1, kl_clip=1e-2)
    for x in torch.randn(4, 8, 6).to(dtype):
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()
    return snapshot(model, optimizer)


@pytest.fixture
def plainly(request: pytest.FixtureRequest) -> Snapshot:
    """The same without kernels, before they are made to serve."""
    result = trained()
    request.getfixturevalue("_kernels_serve")
    return result


def assert_alike(found: Snapshot, expected: Snapshot) -> None:
    """Sums in another order may end on the other side of a number of 16 bits."""
    for name, t in found.items():
        torch.testing.assert_close(t, expected[name], rtol=4e-3, atol=1e-3)


def test_by_kernels(plainly: Snapshot) -> None:
    with warnings.catch_warnings(action="error"):
        assert_alike(trained(), plainly)
    used = {row.kernel.removeprefix("singd::"): row for row in kernels.status()}
    assert used.keys() == {"stochastic_round", "momentum_step_", "inner_product"}
    assert all(row.serves for row in used.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_float32_and_float64(dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    expected = trained(dtype)
    request.getfixturevalue("_kernels_serve")
    found = trained(dtype)
    for name, t in found.items():
        torch.testing.assert_close(t, expected[name])
    assert [row.serves for row in kernels.status()] == [False, dtype == torch.float32, False]


@triton.jit
def _does_not_compile(BLOCK: tl.constexpr):
    tl.static_assert(BLOCK == 0, "no such architecture")


def raises(*args: Any) -> None:
    _does_not_compile[(1,)](BLOCK=1)


def does_nothing(*args: Any) -> Any:
    """Wrong numbers: those of memory that nobody has written."""
    return torch.zeros_like(args[0]) if isinstance(args[0], torch.Tensor) else None


@pytest.mark.parametrize("broken", [raises, does_nothing])
@pytest.mark.parametrize("name", ["rounding", "momentum_step", "inner_products"])
def test_with_one_that_is_broken(
    plainly: Snapshot, name: str, broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module(f"singd.ops.kernels.{name}"), "launch", broken)
    with pytest.warns(RuntimeWarning, match="falls back to PyTorch") as warned:
        assert_alike(trained(), plainly)
    assert len(warned) == 1
    assert sum(row.serves for row in kernels.status()) == 2


def test_diagnostics_list_which_serve(plainly: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {row.kernel for row in diagnostics.kernels()}
    assert {"singd::momentum_step_", "structured::symmetric_product"} <= names
    assert all(row.reason == "not used yet" for row in kernels.status())
    monkeypatch.setattr(importlib.import_module("singd.ops.kernels.rounding"), "launch", raises)
    with pytest.warns(RuntimeWarning):
        trained()
    rows = {row.kernel: row for row in diagnostics.kernels()}
    assert rows["singd::momentum_step_"].serves
    assert rows["singd::stochastic_round"].reason.startswith("falls back to PyTorch: ")
    assert "no such architecture" in str(rows["singd::stochastic_round"])


def test_a_variable_turns_all_off(plainly: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(guard.SWITCH, "0")
    assert_alike(trained(), plainly)
    reasons = {row.reason for row in kernels.status()}
    assert reasons == {"turned off by STRUCTURED_KERNELS=0"}
