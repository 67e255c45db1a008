"""The benchmark of whole steps, with workers that are told what to answer."""

import pytest

pytest.importorskip("matplotlib")

import torch

from benchmarks import nets, optimizers, step
from benchmarks.results import read

TIMES = {"sgd": 10, "singd:dense": 15, "PyPI singd:dense": 20, "soap": 3000}  # milliseconds


class Worker:
    """Answers as if every method took so long, on a machine that changes its speed."""

    turns = 0

    def __init__(self, name, model, T, dtype, peer):
        self.name = f"PyPI {name}" if peer else name
        self.seconds, self.spent = [], 0.0

    def begin(self):
        return self.name in TIMES

    def turn(self):
        slow = 3 if Worker.turns // 2 % 2 else 1  # for a pair of turns
        Worker.turns += 1
        seconds = 1e-3 * slow * TIMES[self.name]
        self.spent += 10 * seconds
        self.seconds.append(seconds)
        return seconds

    def close(self):
        pass


def test_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step, "Worker", Worker)
    monkeypatch.setattr(Worker, "turns", 0)
    out = tmp_path / "step.csv"
    options = ["--models", "mlp", "--T", "10", "--rounds", "3", "--out", str(out)]
    step.main([*options, "--methods", "singd:dense,muon", "--peer", str(tmp_path)])
    assert "muon does not run" in capsys.readouterr().err
    step.main([*options, "--methods", "soap"])
    rows = {row["method"]: row for row in read(out)}
    assert list(rows) == ["sgd", "singd:dense", "PyPI singd:dense", "soap"]
    assert rows["singd:dense"]["over SGD"] == "1.500"
    assert float(rows["singd:dense"]["ratio"]) == pytest.approx(0.5)
    assert rows["soap"]["ratio"] == ""


def test_a_worker_answers():
    worker = step.Worker("sgd", "mlp", 1, "fp32", None)
    try:
        assert worker.begin()
        assert worker.turn() > 0
    finally:
        worker.close()


@pytest.mark.parametrize("name", optimizers.names())
def test_every_method_trains(name):
    model, loss = nets.make("mlp", torch.float32)
    before = [p.clone() for p in model.parameters()]
    optimizer = optimizers.make(name, model, 1)
    for _ in range(2):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    pairs = zip(before, model.parameters(), strict=True)
    assert all(not torch.equal(old, new) for old, new in pairs)
    assert sum(t.nbytes for t in optimizers.state_tensors(optimizer)) > 0
