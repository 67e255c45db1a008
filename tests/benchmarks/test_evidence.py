"""The evidence, on a budget of a few steps."""

import math

import pytest

pytest.importorskip("mlxtend")
pytest.importorskip("matplotlib")
pytest.importorskip("torch_geometric")

from benchmarks import evidence, evidence_report
from benchmarks.evidence import Row, Trial
from benchmarks.tasks import TASKS, digits_graph
from benchmarks.text import python_topics

SMALL = ["--steps", "2", "--seeds", "2", "--checks", "2", "--rounds", "1"]
METHODS = ["AdamW", "SINGD", "SINGD diagonal"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where one small run left its files."""
    folder = tmp_path_factory.mktemp("evidence")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "BLOCK", 1)
        evidence.main(
            [*SMALL, "--tasks", "GCN", "CNN", "--methods", *METHODS, "--out", str(folder)]
        )
    return folder


def test_every_run_has_one_row(folder):
    rows = evidence.read(folder / "evidence.csv")
    assert len(rows) == 2 * (5 + 5 + 3 * 2)
    for row in rows:
        assert all(0 <= score <= 1 for score in row.scores), row
        assert len(row.scores) == (2 if row.trial.stage == "final" else 1)


def test_finals_use_what_the_search_found(folder):
    rows = evidence.read(folder / "evidence.csv")
    for row in rows:
        if row.trial.stage == "final":
            finder = "SINGD" if row.trial.method == "SINGD diagonal" else row.trial.method
            assert row.trial.value == evidence.best(rows, row.trial.task, finder).trial.value


def test_what_is_there_is_not_repeated(folder, monkeypatch):
    monkeypatch.setattr(evidence, "run", lambda *args: pytest.fail("a run is repeated"))
    arguments = ["--runs", "--tasks", "GCN", "--methods", "AdamW", "--out", str(folder)]
    evidence.main([*SMALL, *arguments])
    with pytest.raises(pytest.fail.Exception, match="a run is repeated"):
        evidence.main([*SMALL[:2], "--seeds", "3", *arguments])


def test_the_report_has_every_method_and_the_curves(folder):
    text = (folder / "evidence.md").read_text()
    for method in METHODS:
        assert text.count(f"\n| {method} | ") == 2
    assert text.count("\n- `SINGD` is ") == 2
    assert (folder / "evidence.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_is_the_best_of_those_that_did_not_diverge():
    def row(task, value, score):
        return Row(Trial(task, "SINGD", "search", value, 0, 1), 0.0, [score])

    accuracies = [row("CNN", 1.0, 0.8), row("CNN", 2.0, 0.9), row("CNN", 3.0, math.nan)]
    losses = [row("GPT", 1.0, math.nan), row("GPT", 2.0, 1.5), row("GPT", 3.0, 1.4)]
    assert evidence.best(accuracies, "CNN", "SINGD").trial.value == 2
    assert evidence.best(losses, "GPT", "SINGD").trial.value == 3


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        ([0.9, 0.8], "ahead of AdamW by 0.1950 (39.0 standard errors)"),
        ([0.5, 0.4], "behind AdamW by 0.2050 (41.0 standard errors)"),
        ([0.9, 0.5], "level: ahead of AdamW by 0.0450 (0.3 standard errors)"),
    ],
)
def test_the_comparison_says_who_is_ahead(ours, words):
    def outcome(scores):
        rows = [Row(Trial("CNN", "", "final", 0, i, 1), 0.0, [s]) for i, s in enumerate(scores)]
        return evidence_report.Outcome(rows, {})

    theirs = outcome([0.7, 0.61])
    assert evidence_report.comparison("CNN", outcome(ours), theirs, "AdamW") == words


def test_no_data_serve_twice():
    graph, text = digits_graph(), python_topics()
    parts = [graph.labelled, *graph.held_out.values()]
    assert len({int(i) for part in parts for i in part}) == sum(map(len, parts)) == len(graph.y)
    assert graph.y[graph.labelled].bincount().tolist() == [10] * 10
    assert len(graph.labelled) == TASKS["GCN"].terms
    assert len(text.held_out["test"]) > 40_000
