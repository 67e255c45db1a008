"""Time of a whole training step relative to SGD's, method by method.

    python -m benchmarks.step --models mlp,gpt --T 10 --peer .peer

Every method lives in a process of its own, and the processes take turns of ten steps each, so that
whatever else the machine does falls on all alike; medians over the turns are compared. ``ratio`` is
our time over SGD's, divided by that of PyPI ``singd``. The file is kept up case by case.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import nets
from benchmarks.machine import machine

STRUCTURES = ("dense", "diagonal", "block30diagonal", "hierarchical15_15", "triltoeplitz")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RESULTS = Path("benchmarks/results")
BLOCK = 10  # steps of a turn; a multiple of every T
PATIENCE = 12.0  # seconds after which a slow method has had turns enough

Row = dict[str, str]


def optimizer(
    spec: str, model: torch.nn.Module, T: int, peer: Path | None
) -> torch.optim.Optimizer:
    """Of a spec ``name`` or ``name:structure``; with ``peer``, of PyPI ``singd``."""
    name, _, structure = spec.partition(":")
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=1e-6, foreach=True)
    if name == "adamw-fused":
        return torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    if peer is not None:
        from singd.optim import optimizer as peers  # there is none in ours

        return peers.SINGD(model, lr=1e-6, T=T, structures=(structure, structure))
    from singd import KFAC, SINGD

    if name == "kfac":
        return KFAC(model, lr=1e-6, T=T)
    return SINGD(model, lr=1e-6, T=T, structures=(structure, structure))


def worker(spec: str, model_name: str, T: int, dtype: str, peer: Path | None) -> None:
    """Take ``BLOCK`` steps for every line read, and answer with the seconds of each."""
    if peer is not None:
        sys.path.insert(0, str(peer))  # before the current folder, which holds our singd
    model, loss = nets.make(model_name, DTYPES[dtype])
    method = optimizer(spec, model, T, peer)
    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range(BLOCK):
            method.zero_grad()
            loss().backward()
            method.step()
        print((time.perf_counter() - start) / BLOCK, flush=True)


class Worker:
    """A method in a process of its own."""

    def __init__(self, spec: str, model: str, T: int, dtype: str, peer: Path | None) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.step", "--worker", spec]
        if peer is not None:
            command += ["--peer", str(peer.resolve())]
        self.process = subprocess.Popen(
            [*command, "--models", model, "--T", str(T), "--dtype", dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.seconds: list[float] = []
        self.spent = 0.0

    def turn(self) -> float:
        """Seconds of a step, on average over one period of updates."""
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("the worker has no pipes")
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended: {self.process.args}")
        self.spent += BLOCK * float(line)
        return float(line)

    def close(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait()


def rows(
    model: str, T: int, dtype: str, peer: Path | None, rounds: int, without: Collection[str]
) -> Iterator[Row]:
    """Measure every method on one model."""
    ours = [f"singd:{structure}" for structure in STRUCTURES]
    specs = ["sgd", "adamw", "adamw-fused", "kfac", *ours]
    methods = {spec: Worker(spec, model, T, dtype, None) for spec in specs}
    if peer is not None:
        methods |= {f"PyPI {spec}": Worker(spec, model, T, dtype, peer) for spec in ours}
    for spec in without:
        if spec in methods:
            methods.pop(spec).close()
    try:
        for method in methods.values():
            method.turn()  # sets up
        for _ in tqdm(range(rounds), desc=f"{model} T={T} {dtype}"):
            for method in methods.values():
                if len(method.seconds) < 2 or method.spent < PATIENCE:
                    method.seconds.append(method.turn())
        times = {spec: statistics.median(method.seconds) for spec, method in methods.items()}
        for spec, seconds in times.items():
            over = seconds / times["sgd"] - 1
            row = {"model": model, "dtype": dtype, "T": str(T), "method": spec}
            row |= {"ms": f"{1e3 * seconds:.3f}", "over SGD": f"{1 + over:.3f}", "ratio": ""}
            if f"PyPI {spec}" in times:
                row["ratio"] = f"{over / (times[f'PyPI {spec}'] / times['sgd'] - 1):.3f}"
            yield row
    finally:
        for method in methods.values():
            method.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="mlp,gpt,vit,vgg")
    parser.add_argument("--T", default="10,1")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peer", type=Path, help="where PyPI singd 0.0.5 is installed")
    parser.add_argument("--without", nargs="*", default=[], help="methods to leave out")
    parser.add_argument("--out", type=Path, default=RESULTS / "step.csv")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.models, int(args.T), args.dtype, args.peer)
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(machine(), indent=2) + "\n")
    known = list(csv.DictReader(args.out.open())) if args.out.exists() else []
    for model in args.models.split(","):
        for T in args.T.split(","):
            new = list(rows(model, int(T), args.dtype, args.peer, args.rounds, args.without))
            case = (model, T, args.dtype)
            known = [row for row in known if (row["model"], row["T"], row["dtype"]) != case] + new
            with args.out.open("w", newline="") as file:
                writer = csv.DictWriter(file, new[0])
                writer.writeheader()
                writer.writerows(known)
            for row in new:
                print(*(value.ljust(12) for value in row.values()), flush=True)


if __name__ == "__main__":
    main()
