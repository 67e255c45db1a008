"""The benchmark of operations, at a size where nothing is fast."""

import csv
import json

import pytest

pytest.importorskip("matplotlib")

from benchmarks import ops


def run(out, *options):
    ops.main(["--sizes", "8", "--rows", "2", "--out", str(out), *options])
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


def test_results(tmp_path, monkeypatch):
    monkeypatch.setattr(ops, "BUDGET", 0.0)
    monkeypatch.setattr(ops, "roofline", lambda dtype: ops.Roofline(1e9, 1e9))
    out = tmp_path / "ops.csv"
    rows = run(out, "--dtypes", "fp32", "--structures", "diagonal")
    assert [row["operation"] for row in rows] == list(ops.OPERATIONS)
    rows = run(out, "--dtypes", "bf16", "--structures", "diagonal;circulant")
    assert len(rows) == 3 * len(ops.OPERATIONS)  # the first run's are kept
    by_case = {(row["structure"], row["dtype"], row["operation"]): row for row in rows}
    product = by_case["diagonal", "fp32", "A @ X"]
    assert int(product["bytes"]) == 4 * (8 + 2 * 16)  # d, X and the result
    assert float(product["roofline us"]) == pytest.approx(0.16)
    assert int(by_case["circulant", "bf16", "A @ X"]["flops"]) == 2 * 8 * 8 * 2  # written out
    machine = json.loads(out.with_suffix(".json").read_text())
    assert set(machine["roofline"]) == {"fp32", "bf16"}
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
