"""Time of a whole training step relative to SGD's, method by method.

    python -m benchmarks.step --models mlp,gpt --T 10 --peer .peer
    python -m benchmarks.step --models vgg --T 1 --methods singd:dense,muon --dtypes bf16

Every method lives in a process of its own, with threads bound to cores. The processes take turns of
ten steps each, after three that do not count (of one period of updates, where those take long). A
turn of SGD comes right before every other: ``over SGD`` is the median of such pairs, since cores
that share their caches with strangers are by a third faster or slower from one second to the next.
``ratio`` is what a step takes beyond SGD's, divided by the same of PyPI ``singd``. Five turns
(fewer, where they take long) come before: ours looks in its first passes, and ever more rarely,
whether the layers explain the gradients. A method that cannot run is left out, with a word on why.
``step.csv`` is kept up case by case; rows of methods that are not named, and of other processors,
stay.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import nets, optimizers, workers
from benchmarks.machine import processor
from benchmarks.nets import DTYPES
from benchmarks.results import RESULTS, Row, keep

KEY = ("processor", "model", "dtype", "T", "method")
BLOCK = 10  # steps of a turn; a multiple of every T
PATIENCE = 12.0  # seconds after which a slow method has had turns enough
WARMUP = 5  # turns
BEFORE = 3  # steps in a turn that do not count


def worker(name: str, model_name: str, T: int, dtype: str, peer: bool) -> None:
    """Take as many steps as every line read says, and answer with the seconds of each.

    The line also says how many to take before, to have the data in the caches again.
    """
    torch.set_flush_denormal(True)  # the better a method fits the one batch, the more there were
    model, loss = nets.make(model_name, DTYPES[dtype])
    method = optimizers.make(name, model, T, peer=peer)

    def steps(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            method.zero_grad()
            loss().backward()
            method.step()
        return time.perf_counter() - start

    for line in sys.stdin:
        before, count = map(int, line.split())
        steps(before)
        print(steps(count) / count, flush=True)


class Worker:
    """A method in a process of its own; ``peer`` is where PyPI ``singd`` is, if that is meant."""

    def __init__(self, name: str, model: str, T: int, dtype: str, peer: Path | None) -> None:
        self.process = subprocess.Popen(
            workers.command("step", name, model, str(T), dtype, "peer" if peer else ""),
            env=workers.environment(peer),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.steps, self.before = T, 0
        self.seconds: list[float] = []
        self.spent = 0.0

    def begin(self) -> bool:
        """Set up; whether that went well."""
        try:
            once = self.turn()
        except (OSError, RuntimeError):
            return False
        if once * BLOCK <= PATIENCE / 4:
            self.steps, self.before = BLOCK, BEFORE
        for _ in range(WARMUP - 1):
            if self.spent < PATIENCE:
                self.turn()
        self.seconds, self.spent = [], 0.0
        return True

    def turn(self) -> float:
        """Seconds of a step, on average over one turn."""
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("the worker has no pipes")
        self.process.stdin.write(f"{self.before} {self.steps}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended: {self.process.args}")
        seconds = float(line)
        self.spent += (self.before + self.steps) * seconds
        self.seconds.append(seconds)
        return seconds

    def close(self) -> None:
        """End the process."""
        self.process.terminate()
        with self.process:  # closes the pipes and waits
            pass


def rows(
    model: str, T: int, dtype: str, names: Sequence[str], peer: Path | None, rounds: int
) -> Iterator[Row]:
    """Measure methods on one model; SGD first."""
    methods = {
        name: Worker(
            name.removeprefix("PyPI "), model, T, dtype, peer if name.startswith("PyPI ") else None
        )
        for name in names
    }
    over: dict[str, list[float]] = {name: [] for name in names}
    try:
        for name in [name for name, method in methods.items() if not method.begin()]:
            print(f"{name} does not run on {model} in {dtype}", file=sys.stderr)
            methods.pop(name).close()
        sgd = methods["sgd"]
        for _ in tqdm(range(rounds), desc=f"{model} T={T} {dtype}"):
            for name, method in methods.items():
                if method is not sgd and (len(over[name]) < 2 or method.spent < PATIENCE):
                    before = sgd.turn()
                    over[name].append(method.turn() / before)
    finally:
        for method in methods.values():
            method.close()
    over["sgd"] = [1.0]
    ratios = {name: statistics.median(over[name]) for name in methods}
    for name, ratio in ratios.items():
        ms = 1e3 * statistics.median(methods[name].seconds)
        row = dict(zip(KEY, (processor(), model, dtype, str(T), name), strict=True))
        row |= {"ms": f"{ms:.3f}", "over SGD": f"{ratio:.3f}", "ratio": ""}
        if f"PyPI {name}" in ratios:
            row["ratio"] = f"{(ratio - 1) / (ratios[f'PyPI {name}'] - 1):.3f}"
        yield row


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.step", description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="mlp,gpt,vit,vgg")
    parser.add_argument("--T", default="10,1")
    parser.add_argument("--dtypes", default="fp32")
    parser.add_argument("--methods", help="with commas; all, and those of PyPI, if not given")
    parser.add_argument("--without", nargs="*", default=[], help="methods to leave out")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peer", type=Path, help="where PyPI singd 0.0.5 is installed")
    parser.add_argument("--out", type=Path, default=RESULTS / "step.csv")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        name, model, T, dtype, peer = args.worker
        worker(name, model, int(T), dtype, bool(peer))
        return
    names = args.methods.split(",") if args.methods else list(optimizers.names())
    if args.peer:
        names += [f"PyPI {name}" for name in names if name in optimizers.OURS]
    names = ["sgd", *(name for name in names if name not in ("sgd", *args.without))]
    for dtype in args.dtypes.split(","):
        for model in args.models.split(","):
            for T in map(int, args.T.split(",")):
                new = list(rows(model, T, dtype, names, args.peer, args.rounds))
                keep(args.out, new, KEY)
                for row in new:
                    print(*(value.ljust(12) for value in row.values()), flush=True)


if __name__ == "__main__":
    main()
