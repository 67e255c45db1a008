"""The demonstration, on a budget of a few steps."""

import csv
import math

import pytest

pytest.importorskip("mlxtend")
pytest.importorskip("matplotlib")

from benchmarks import demo
from benchmarks.methods import METHODS


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """The folder and the printed text of one small run."""
    out = tmp_path_factory.mktemp("demo")
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.cost.BLOCK", 2)
        patch.setattr("builtins.print", lambda *args, sep=" ": lines.append(sep.join(args)))
        demo.main(
            ["--steps", "2", "--seeds", "1", "--rounds", "1", "--workers", "1", "--out", str(out)]
        )
    return out, "\n".join(lines)


def test_the_table_has_every_method(outcome):
    _, text = outcome
    for method in METHODS:
        assert text.count(f"\n{method:<22}") == 2, method  # once per model


def test_numbers_are_finite_and_complete(outcome):
    out, _ = outcome
    with (out / "demo.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["model"], r["precision"], r["method"]) for r in rows] == demo.cells()
    for row in rows:
        numbers = [float(row[name]) for name in demo.COLUMNS[3:]]
        assert all(math.isfinite(number) for number in numbers), row
        assert 0 <= float(row["accuracy"]) <= 1


def test_ratios_are_relative_to_sgd(outcome):
    out, _ = outcome
    with (out / "demo.csv").open(newline="") as file:
        first = next(csv.DictReader(file))
    assert first["method"] == "SGD"
    assert [float(first[name]) for name in ("state", "memory", "time")] == [1, 1, 1]


def test_curves_are_drawn(outcome):
    out, _ = outcome
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_every_method_is_judged_at_the_defaults(outcome):
    _, text = outcome
    assert text.count("SINGD(model) ") - text.count("\nSINGD(model) ") == 4
