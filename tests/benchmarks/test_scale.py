"""What is calculated for many GPUs is what a few ranks do."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.scale.__main__ import METHODS, main, row
from benchmarks.scale.check import check
from benchmarks.scale.models import MODELS, Assumptions


def test_bytes_and_operations_are_those_of_runs_on_ranks() -> None:
    rows = check()
    assert len(rows) > 10
    for found in rows:
        for name in ("state", "buffers", "sent", "products"):
            assert float(found[f"{name}, over predicted"]) == pytest.approx(1, abs=1e-3), found


@pytest.mark.parametrize(
    ("name", "billions"), [("1B", 1.236), ("8B", 8.03), ("70B", 70.6), ("405B", 405.9)]
)
def test_models_have_as_many_parameters_as_they_are_known_for(name: str, billions: float) -> None:
    assert MODELS[name].parameters / 1e9 == pytest.approx(billions, rel=2e-3)


def number(found: dict[str, str], name: str) -> float:
    return float(found[name].rstrip("%"))


def test_costs_move_as_their_assumptions_do() -> None:
    given = Assumptions()
    rows = {m: row("1B", 64, 1, m, given) for m in METHODS}
    state = {m: number(r, "state MB") for m, r in rows.items()}
    assert state["SINGD, diagonal"] < state["AdamW"] < state["SINGD, dense"]
    assert state["SINGD, dense"] < state["SINGD, dense, everywhere"] / 10
    assert number(rows["SINGD, diagonal"], "sent MB") < 1 < number(rows["Muon"], "sent MB")
    assert rows["SINGD, diagonal"]["places"] == "rows 100%"
    slow = row("1B", 64, 1, "SINGD, dense", Assumptions(bandwidth=5e9))
    rare = row("1B", 64, 1, "SINGD, dense", Assumptions(interval=100))
    few = row("1B", 64, 1, "SINGD, dense", Assumptions(sample=8))
    times = [number(r, "added ms") for r in (slow, rows["SINGD, dense"], few, rare)]
    assert times == sorted(times, reverse=True)


def test_the_command_keeps_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--models", "1B", "--methods", "AdamW", "SINGD, diagonal", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["model", "gpus", "tensor"]
    assert len(lines) == 3
    assert (tmp_path / "scale.csv").read_text().count("1B") == 2
    main(["--models", "1B", "--methods", "Muon", "--gpus", "64", "4096", "--out", str(tmp_path)])
    assert len(capsys.readouterr().out.splitlines()) == 3
