"""The language-model track, in small, on shards of made-up tokens."""

import json

import numpy as np
import pytest
import torch

from benchmarks.track import __main__ as track
from benchmarks.track import data
from benchmarks.track.entries import GPT2, METHODS


def write(path, tokens, magic=data.MAGIC):
    head = np.zeros(data.HEADER, dtype=np.int32)
    head[:3] = magic, 1, len(tokens)
    path.write_bytes(head.tobytes() + tokens.astype(np.uint16).tobytes())


@pytest.fixture
def folder(tmp_path):
    """Two shards to train on and one to judge by: counting modulo 13, so that there is a rule."""
    for name, size in (("train_000001", 500), ("train_000002", 300), ("val_000000", 400)):
        write(tmp_path / f"made_{name}.bin", np.arange(size) % 13)
    return tmp_path


def run(folder, method, *more):
    out = folder / f"{method}.jsonl"
    track.main(["--small", "--data", str(folder), "--method", method, "--out", str(out), *more])
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize("method", METHODS)
def test_every_entry_trains(folder, method):
    rows = run(folder, method, "--steps", "12")
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    losses = [row["loss"] for row in rows]
    assert losses[-1] < losses[0] < 4.3  # log(64) = 4.16
    assert not rows[-1]["reached"] or losses[-1] <= data.TARGET


@pytest.mark.parametrize("method", ["singd", "kl_shampoo"])
def test_a_run_goes_on_as_if_it_had_not_stopped(folder, method, monkeypatch):
    whole = run(folder, method)
    (folder / f"{method}.jsonl").unlink()
    tell, saved = track.Run.tell, ("--checkpoint", str(folder / "state.pt"))

    def stop(self, loss):
        tell(self, loss)
        if self.done == 4:
            self.save(self.given.checkpoint)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(track.Run, "tell", stop)
        with pytest.raises(KeyboardInterrupt):
            run(folder, method, *saved)
    rows = run(folder, method, *saved)
    assert [(r["step"], r["loss"]) for r in rows] == [(r["step"], r["loss"]) for r in whole]


def test_ranks_see_all_tokens_once_and_in_order(folder):
    small = data.SMALL
    size = small.rows * small.length
    alone = data.batches(folder, "train", small, 0, 1)
    pair = [data.batches(folder, "train", small, rank, 2) for rank in range(2)]
    whole = [next(alone) for _ in range(6)]
    for i in range(0, 6, 2):
        assert torch.equal(next(pair[0]), whole[i])
        assert torch.equal(next(pair[1]), whole[i + 1])
    assert whole[0].shape == (small.rows, small.length + 1)
    assert torch.equal(whole[1].flatten()[:1], torch.tensor([size % 13]))


def test_the_model_is_gpt2():
    with torch.device("meta"):
        model = GPT2(data.Track())
    count = sum(p.numel() for p in model.parameters())
    assert 123e6 < count < 126e6
    assert track.passes(524_288, data.Track(), 8) == 2


def test_what_is_no_shard_is_an_error(folder):
    write(folder / "made_train_000000.bin", np.arange(10), magic=1)
    with pytest.raises(ValueError, match="expected a shard of tokens"):
        next(data.batches(folder, "train", data.SMALL, 0, 1))
    with pytest.raises(ValueError, match="expected files"):
        next(data.batches(folder, "nothing", data.SMALL, 0, 1))
    with pytest.raises(ValueError, match="to divide into passes"):
        track.passes(100, data.SMALL, 3)
