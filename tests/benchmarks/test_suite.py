"""The suite of tasks, a few steps of each."""

import math

import pytest
import torch

pytest.importorskip("mlxtend")
pytest.importorskip("networkx")

from benchmarks.results import read
from benchmarks.suite import TASKS, __main__, methods, report, train

PARTS = ("development", "held out")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Where the smallest run left its rows."""
    path = tmp_path_factory.mktemp("suite") / "suite.csv"
    __main__.main(["--small", "--out", str(path)])
    return path


def test_every_task_and_method_has_a_row(table):
    rows = read(table)
    assert sorted({row["task"] for row in rows}) == sorted(TASKS)
    assert len(rows) == 2 * len(TASKS)
    assert all(math.isfinite(float(row["test loss"])) for row in rows)
    assert all(int(row["state bytes"]) > 0 for row in rows)


def test_what_is_there_is_not_run_again(table, monkeypatch, capsys):
    before = table.read_text()
    monkeypatch.setattr(__main__, "run", lambda *_: pytest.fail("a run is repeated"))
    __main__.main(["--small", "--out", str(table)])
    assert table.read_text() == before
    printed = capsys.readouterr().out
    assert all(name in printed for name in TASKS)
    with pytest.raises(pytest.fail.Exception, match="repeated"):
        __main__.main(["--small", "--seeds", "1", "--out", str(table)])


def test_either_half_has_half_of_the_tasks():
    counts = [sum(task.part == part for task in TASKS.values()) for part in PARTS]
    assert sum(counts) == len(TASKS)
    assert abs(counts[0] - counts[1]) <= 1


def inputs(name, batch):
    """The samples of a batch, hashable; the nodes of a graph stand on the diagonal."""
    data = batch[0] + batch[1].diag_embed() if name == "graph attention" else batch[0]
    return {tuple(row.flatten().tolist()) for row in data}


@pytest.mark.parametrize("name", TASKS)
def test_what_is_judged_is_not_trained_on(name):
    task = TASKS[name]
    seen = inputs(name, next(task.batches(0, 200)))
    assert not any(inputs(name, batch) & seen for batch in task.held_out())


def test_equal_seeds_are_equal_runs_and_others_are_not():
    make = methods.make("adamw:lr=0.01")
    task = TASKS["regression on 442 rows"]
    first, again, other = (train(task, make, seed=s, steps=5).test_loss for s in (0, 0, 1))
    assert first == again != other


def test_training_lowers_what_is_reported():
    for name in ("regression on 442 rows", "autoencoder, mean MSE", "VAE"):
        torch.manual_seed(0)
        before = TASKS[name].test_loss(TASKS[name].model())
        run = train(TASKS[name], methods.make("adamw:lr=0.01"), steps=50)
        assert run.test_loss < before


def test_ratios_are_to_the_best_rate():
    def row(spec, loss):
        method, _, options = spec.partition(":")
        return {"task": "VAE", "method": method, "options": options, "test loss": loss}

    rows = [row("adamw:lr=1", "4"), row("adamw:lr=2", "2"), row("singd", "1"), row("soap", "nan")]
    found = report.ratios(rows)
    assert {spec: tasks["VAE"] for spec, tasks in found.items()} == {
        "adamw:lr=1": 2.0,
        "adamw:lr=2": 1.0,
        "singd": 0.5,
        "soap": math.inf,
    }


@pytest.mark.parametrize(
    ("spec", "options"),
    [("singd", {}), ("singd:lr=1e-2,structures=('dense', 'diagonal')", None)],
)
def test_options_are_those_of_a_call(spec, options):
    name, found = methods.parse(spec)
    assert name == "singd"
    assert found == ({"lr": 1e-2, "structures": ("dense", "diagonal")} if options is None else {})


def test_an_unknown_method_is_an_error():
    with pytest.raises(ValueError, match=r"expected one of adamw, singd.*got 'adam'"):
        methods.parse("adam:lr=1")
