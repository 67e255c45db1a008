"""The parts of a step: times that add up, and counts that are known."""

import pytest
import torch

pytest.importorskip("matplotlib")

from benchmarks import breakdown, nets
from benchmarks.results import read

ON = breakdown.Machine(bandwidth=1e9, rate=1e9, call=1e-6)
SIZES = [(784, 512), (512, 512), (512, 10)]


def measure(name, T):
    return breakdown.breakdown(name, "mlp", "fp32", T, ON, seconds=0.0)


def test_every_part_of_the_library_is_found():
    """The names in ``PARTS`` are those of functions that run in a step."""
    found = measure("singd:dense", 1)
    assert list(found) == list(breakdown.NAMES)
    assert all(part["measured"] > 0 and part["operations"] > 0 for part in found.values())
    assert all(part["predicted"] > 0 for part in found.values())


def test_flops_are_those_of_the_formulas():
    """Forward, two products backward (but none for the input); with dense factors four products
    of the gradient where K K^T is kept, two and two."""
    rows = 128
    forward = sum(2 * rows * i * o for i, o in SIZES)
    backward = forward + sum(2 * rows * i * o for i, o in SIZES[1:])
    found = measure("singd:dense", 1)
    assert found["model"]["flops"] == forward + backward
    applied = sum(2 * o * (i + 1) ** 2 + 2 * (i + 1) * o**2 for i, o in SIZES)
    assert found["preconditioning"]["flops"] == pytest.approx(applied, rel=0.01)


def test_factors_cost_once_in_T_steps():
    once, often = (measure("singd:dense", T)["factors"]["flops"] for T in (4, 1))
    assert once == pytest.approx(often / 4, rel=1e-6)


def test_what_is_nested_counts_once():
    clock = breakdown.Clock()
    with clock("outer"), clock("inner"):
        pass
    assert set(clock.seconds) == {"outer"}
    demand = breakdown.Demand(ON)
    with demand, demand.within("outer"), demand.within("inner"):
        torch.ones(2, 3) @ torch.ones(3, 4)
    assert demand.total["outer"]["flops"] == 2 * 2 * 3 * 4
    assert set(demand.total) == {"outer"}


def test_table(tmp_path, monkeypatch):
    monkeypatch.setattr(breakdown, "machine", lambda dtype: ON)
    out = tmp_path / "breakdown.csv"
    options = ["--models", "mlp", "--T", "1", "--seconds", "0", "--out", str(out), "--methods"]
    breakdown.main([*options, "singd:diagonal"])
    breakdown.main([*options, "singd:diagonal,kfac"])
    rows = read(out)
    assert len(rows) == 2 * len(breakdown.NAMES)
    assert {row["method"] for row in rows} == {"singd:diagonal", "kfac"}
    assert "mlp" in nets.MODELS
