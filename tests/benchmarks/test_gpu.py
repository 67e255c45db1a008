"""The script for a GPU goes through all its parts, on the CPU at tiny sizes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

pytest.importorskip("triton")
from benchmarks import gpu


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert {part["status"] for part in report["parts"].values()} == {"done"}
    for name in gpu.PARTS:
        with (tmp_path / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert rows
        assert not any(row.get("error") for row in rows), rows


def test_a_part_that_fails_and_one_without_time_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(run: gpu.Run) -> list[gpu.Row]:
        raise RuntimeError("broken on purpose")

    monkeypatch.setitem(gpu.PARTS, "dense", (fails, 1))
    monkeypatch.setitem(gpu.PARTS, "kernels", (gpu.kernels, 1e9))
    arguments = ["--dry-run", "--out", str(tmp_path), "--parts", "machine,dense,kernels,sync"]
    assert gpu.main(arguments) == 1
    parts = json.loads((tmp_path / "report.json").read_text())["parts"]
    assert parts["dense"]["status"] == "failed: RuntimeError('broken on purpose')"
    assert parts["kernels"]["status"].startswith("left out")
    assert parts["machine"]["status"] == parts["sync"]["status"] == "done"
    assert "2 parts done, 2 not" in capsys.readouterr().out
