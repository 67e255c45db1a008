"""Time of a whole training step relative to SGD's, method by method.

    python -m benchmarks.step --models mlp,gpt --T 10 --peer .peer

Every method lives in a process of its own, and the processes take turns, one step each, so that
whatever else the machine does falls on all alike. A method that updates its factors every T steps
is charged the medians of its plain and its updating steps in that proportion.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import nets

STRUCTURES = ("dense", "diagonal", "block30diagonal", "hierarchical15_15", "triltoeplitz")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RESULTS = Path("benchmarks/results")


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
    """Take a step for every line read, and answer with its seconds."""
    if peer is not None:
        sys.path.insert(0, str(peer))  # before the current folder, which holds our singd
    model, loss = nets.make(model_name, DTYPES[dtype])
    method = optimizer(spec, model, T, peer)
    for _ in sys.stdin:
        start = time.perf_counter()
        method.zero_grad()
        loss().backward()
        method.step()
        print(time.perf_counter() - start, flush=True)


class Worker:
    """A method in a process of its own."""

    def __init__(self, spec: str, model: str, T: int, dtype: str, peer: Path | None) -> None:
        module = "benchmarks.step"
        command = [sys.executable, "-W", "ignore", "-m", module, "--worker", spec]
        if peer is not None:
            command += ["--peer", str(peer.resolve())]
        self.T = T if ":" in spec or spec == "kfac" else 1
        self.process = subprocess.Popen(
            [*command, "--models", model, "--T", str(T), "--dtype", dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.plain: list[float] = []
        self.updating: list[float] = []
        self.count = 0

    def step(self) -> None:
        """One step, timed by the process itself."""
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("the worker has no pipes")
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended: {self.process.args}")
        if self.count >= 2:  # the first steps set up
            (self.updating if self.count % self.T == 0 else self.plain).append(float(line))
        self.count += 1

    @property
    def seconds(self) -> float:
        """Of a step on average, from medians."""
        updating = statistics.median(self.updating)
        if not self.plain:
            return updating
        return (updating + (self.T - 1) * statistics.median(self.plain)) / self.T

    def close(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait()


def rows(model: str, T: int, dtype: str, peer: Path | None, steps: int) -> Iterator[dict[str, str]]:
    """Measure every method on one model."""
    ours = [f"singd:{structure}" for structure in STRUCTURES]
    specs = ["sgd", "adamw", "adamw-fused", "kfac", *ours]
    methods = {spec: Worker(spec, model, T, dtype, None) for spec in specs}
    if peer is not None:
        methods |= {f"PyPI {spec}": Worker(spec, model, T, dtype, peer) for spec in ours}
    try:
        for _ in tqdm(range(steps), desc=f"{model} T={T} {dtype}"):
            for method in methods.values():
                method.step()
        sgd = methods["sgd"].seconds
        for spec, method in methods.items():
            over = (method.seconds - sgd) / sgd
            row = {"model": model, "dtype": dtype, "T": str(T), "method": spec}
            row |= {"ms": f"{1e3 * method.seconds:.3f}", "over SGD": f"{1 + over:.3f}", "ratio": ""}
            if f"PyPI {spec}" in methods:
                row["ratio"] = f"{over / ((methods[f'PyPI {spec}'].seconds - sgd) / sgd):.3f}"
            yield row
    finally:
        for method in methods.values():
            method.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="mlp,gpt,vit,vgg")
    parser.add_argument("--T", default="10,1")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--steps", type=int, default=42)
    parser.add_argument("--peer", type=Path, help="where PyPI singd 0.0.5 is installed")
    parser.add_argument("--out", type=Path, default=RESULTS / "step.csv")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.models, int(args.T), args.dtype, args.peer)
        return
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    table = [
        row
        for model in args.models.split(",")
        for T in args.T.split(",")
        for row in rows(model, int(T), args.dtype, args.peer, args.steps)
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    for row in table:
        print(*(value.ljust(12) for value in row.values()))


if __name__ == "__main__":
    main()
