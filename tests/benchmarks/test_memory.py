"""The benchmark of memory: bytes that are known, and the table."""

import pytest

pytest.importorskip("matplotlib")

from benchmarks import memory, nets
from benchmarks.results import read

SIZES = [(784, 512), (512, 512), (512, 10)]
WEIGHTS = 4 * sum(d_in * d_out + d_out for d_in, d_out in SIZES)
FACTORS = 4 * sum(d_in + 1 + d_out for d_in, d_out in SIZES)
NORMS = 2 * 4 * len(SIZES)  # of directions


def measure(name, model="mlp", T=1):
    return memory.measure(name, model, "fp32", "cpu", T, False)


def test_bytes_of_the_state():
    assert measure("sgd")["state"] == WEIGHTS
    assert measure("adamw")["state"] == 2 * WEIGHTS + 4 * 6  # and the number of the step
    diagonal = measure("singd:diagonal")
    assert diagonal["state"] == WEIGHTS + FACTORS + NORMS
    assert diagonal["statistics"] == FACTORS
    assert diagonal["held"] >= diagonal["state"]
    assert diagonal["input"] == 4 * 128 * 784


def test_the_peak_holds_what_must_be_there():
    """Weights, momenta, batch, and gradients in the step, activations in the backward pass."""
    sgd = measure("sgd")
    batch = 4 * 128 * 784 + 8 * 128
    assert sgd["step"] == 3 * WEIGHTS + batch
    assert sgd["backward"] >= 2 * WEIGHTS + batch + 4 * 128 * 2 * 512


@pytest.mark.parametrize(
    ("model", "method", "bound"),
    [
        ("vit", "singd:diagonal", 0.51),
        ("gpt", "singd:diagonal+embeddings", 0.515),  # the positions are one percent of it
        ("gpt", "singd:diagonal", 0.525),
        ("gpt", "singd", 1.5),
        ("vit", "singd", 1.5),
    ],
)
def test_the_state_over_that_of_adamw(monkeypatch, model, method, bound):
    """Half of it is the momentum; the rest is AdamW's part, two numbers for each, and factors."""
    whole = nets.BATCHES[model]
    monkeypatch.setitem(nets.BATCHES, model, lambda: tuple(t[:2] for t in whole()))
    ours, theirs = (measure(name, model)["state"] for name in (method, "adamw"))
    assert 0.5 < ours / theirs < bound


def test_table(tmp_path, monkeypatch):
    def ask(name, case, T, peer):
        return measure(name, case[0], 1)

    monkeypatch.setattr(memory, "ask", ask)
    out = tmp_path / "memory.csv"
    options = ["--models", "mlp", "--out", str(out), "--methods"]
    memory.main([*options, "singd:diagonal"])
    memory.main([*options, "adamw,singd:dense"])
    rows = {row["method"]: row for row in read(out)}
    assert list(rows) == ["sgd", "singd:diagonal", "adamw", "singd:dense"]
    assert rows["sgd"]["extra"] == "0"
    peaks = {k: max(int(row["backward"]), int(row["step"])) for k, row in rows.items()}
    assert int(rows["singd:dense"]["extra"]) == peaks["singd:dense"] - peaks["sgd"]
    assert int(rows["singd:dense"]["limit"]) > int(rows["singd:diagonal"]["limit"])
    assert rows["adamw"]["limit"] == ""
    assert out.with_suffix(".json").exists()
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
