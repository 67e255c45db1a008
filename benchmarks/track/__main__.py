"""The public language-model track: GPT-2 with 124M parameters, fewest steps to a loss of 3.28.

Data, batch and target are those of "modded-nanogpt" (github.com/KellerJordan/modded-nanogpt):
FineWeb in tokens of GPT-2, 524,288 tokens a step in rows of 1024, and 3.28 nats on the first
10,485,760 tokens of validation. Its ``data/cached_fineweb10B.py`` fetches the files::

    torchrun --nproc_per_node 8 -m benchmarks.track --data fineweb10B --method singd
    python -m benchmarks.track --small --data DIR --method kl_shampoo    # a few steps

A line of JSON for every validation goes to ``--out``; the state to ``--checkpoint``, from
which the same command goes on. Batches are the tokens in their order, shard after shard.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.track.data import SMALL, TARGET, Track, batches
from benchmarks.track.entries import GPT2, METHODS, parts_of, unwrapped


def rate(step: int, steps: int) -> float:
    """Of step 0, 1, ...: up over 4 %, level, and down to zero over the last 40 %."""
    return min((step + 1) / (0.04 * steps + 1), 1.0, (steps - step) / (0.4 * steps))


def passes(tokens: int, track: Track, ranks: int) -> int:
    """Passes of every rank for as many tokens."""
    count, left = divmod(tokens, track.rows * track.length * ranks)
    if left or not count:
        raise ValueError(f"expected {tokens} tokens to divide into passes of all {ranks} ranks")
    return count


class Run:
    """One run of one method, on this rank."""

    def __init__(self, given: argparse.Namespace, track: Track) -> None:
        self.given, self.track = given, track
        self.rank = int(os.environ.get("RANK", 0))
        self.ranks = int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        torch.manual_seed(given.seed)
        self.model: nn.Module = GPT2(track).to(self.device)
        if self.ranks > 1:
            dist.init_process_group()
            self.model = DistributedDataParallel(self.model)
        own = {} if given.lr is None else {"lr": given.lr}
        self.optimizer = METHODS[given.method](self.model, **own)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.done, self.seconds = 0, 0.0

    def loss(self, rows: Tensor) -> Tensor:
        rows = rows.to(self.device)
        on_gpu = self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=on_gpu):
            return self.model(rows[:, :-1], rows[:, 1:])

    def step(self, data: Iterator[Tensor]) -> None:
        """A step of the whole batch, in several passes."""
        for group, lr in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = lr * rate(self.done, self.track.steps)
        self.optimizer.zero_grad()
        count = passes(self.track.batch, self.track, self.ranks)
        for k in range(count):
            alone = k + 1 < count and isinstance(self.model, DistributedDataParallel)
            with self.model.no_sync() if alone else contextlib.nullcontext():
                (self.loss(next(data)) / count).backward()
        self.optimizer.step()
        self.done += 1

    @torch.no_grad()
    def validate(self) -> float:
        """The mean loss in nats on the first tokens of validation."""
        self.model.eval()
        data = batches(self.given.data, "val", self.track, self.rank, self.ranks)
        count = passes(self.track.validation, self.track, self.ranks)
        total = torch.stack([self.loss(next(data)).double() for _ in range(count)]).mean()
        if self.ranks > 1:
            dist.all_reduce(total, dist.ReduceOp.AVG)
        self.model.train()
        return total.item()

    def save(self, path: Path) -> None:
        states = [part.state_dict() for part in parts_of(self.optimizer)]
        state = {"model": unwrapped(self.model).state_dict(), "optimizers": states}
        if self.rank == 0:
            torch.save(state | {"done": self.done, "seconds": self.seconds}, path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device)
        unwrapped(self.model).load_state_dict(state["model"])
        for part, saved in zip(parts_of(self.optimizer), state["optimizers"], strict=True):
            part.load_state_dict(saved)
        self.done, self.seconds = state["done"], state["seconds"]

    def train(self) -> None:
        """Train from where the run stands, and tell every validation."""
        given, track = self.given, self.track
        data = batches(given.data, "train", track, self.rank, self.ranks)
        seen = self.done * passes(track.batch, track, self.ranks)
        data = islice(data, seen, None)
        while self.done < track.steps:
            started = time.perf_counter()
            self.step(data)
            if self.done % track.every and self.done < track.steps:
                self.seconds += time.perf_counter() - started
                continue
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - started
            self.tell(self.validate())
            if given.checkpoint:
                self.save(given.checkpoint)

    def tell(self, loss: float) -> None:
        """One line, on the first rank."""
        given = self.given
        row = {"method": given.method, "lr": self.rates[0], "seed": given.seed, "step": self.done}
        row |= {
            "steps": self.track.steps,
            "loss": round(loss, 5),
            "seconds": round(self.seconds, 1),
        }
        row |= {"reached": loss <= TARGET, "ranks": self.ranks}
        if self.rank == 0:
            print(json.dumps(row), flush=True)
            with given.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.track", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of shards")
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--lr", type=float, help="in place of the entry's")
    parser.add_argument("--steps", type=int, help="length of the run and of its schedule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("track.jsonl"))
    parser.add_argument("--checkpoint", type=Path, help="file to go on from, and to save to")
    parser.add_argument("--small", action="store_true", help="a tiny model, for a few steps")
    given = parser.parse_args(arguments)
    track = SMALL if given.small else Track()
    run = Run(given, replace(track, steps=given.steps or track.steps))
    if given.checkpoint and given.checkpoint.exists():
        run.load(given.checkpoint)
    run.train()
    if run.ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
