"""Time of every operation of every structure: against dense, a roofline and PyPI ``singd`` 0.0.5.

    python -m benchmarks.ops --sizes 512,1024 --rows 64,256 --dtypes fp32,bf16 --peer .peer

Structure and dense take turns, call by call, so that whatever else the machine does falls on both
alike; medians are compared. The peer, which also calls its package ``singd``, lives in a process of
its own and has its turn after each case, against ours alone (which no dense call drives out of the
cache). One thread, by default: two that wait for each other measure the scheduler of a busy
machine. Results go to ``benchmarks/results/ops.csv``, where rows of other runs are kept, the
machine to ``ops.json`` beside it, a plot to ``ops.png``.

The roofline is the time that the operation takes at best: the larger of its bytes (operands read
and result written, once) at the speed of a large copy and its floating-point operations (matrix
products and FFTs) at the speed of a large product, both measured in the same run. Operands that
stay in the cache may beat it.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from benchmarks import workers
from benchmarks.machine import machine
from benchmarks.nets import DTYPES
from benchmarks.results import read
from structured import parse
from structured.costs import PRODUCTS, work

SPECS = (
    *("scaled_identity", "diagonal", "block_diagonal(30)", "lower_triangular", "upper_triangular"),
    *(
        "lower_toeplitz",
        "upper_toeplitz",
        "circulant",
        "block_circulant(16)",
        "hierarchical(15, 15)",
    ),
    *("low_rank_upper(30)", "low_rank_lower(-30)", "direct_sum(dense, diagonal, 30)"),
    *("tied(16, dense)", "strided(16, dense)"),
    *("rotated(diagonal, cosine)", "rotated(diagonal, hadamard)"),
)
OPERATIONS: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "A @ X": lambda A, X, S: A.apply(X),
    "A.mT @ X": lambda A, X, S: A.apply_transpose(X),
    "project_gram(X)": lambda A, X, S: A.project_gram(X),
    "A @ B": lambda A, X, S: A.matmul(A),
    "project(S)": lambda A, X, S: A.project(S),
    "gram()": lambda A, X, S: A.gram(),
    "trace()": lambda A, X, S: A.trace(),
    "add_scaled_identity(1)": lambda A, X, S: A.add_scaled_identity(1.0),
}
OF_COLUMNS = ("A @ X", "A.mT @ X", "project_gram(X)")

PEER = {
    "diagonal": "diagonal",
    "block_diagonal(30)": "block30diagonal",
    "hierarchical(15, 15)": "hierarchical15_15",
    "lower_toeplitz": "triltoeplitz",
    "upper_toeplitz": "triutoeplitz",
}
PEER_OPERATIONS: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "A @ X": lambda A, X, S: A @ X,
    "A.mT @ X": lambda A, X, S: A.rmatmat(X),
    "project_gram(X)": lambda A, X, S: A.from_mat_inner(X),
    "A @ B": lambda A, X, S: A @ A,
    "project(S)": lambda A, X, S: A.from_dense(S),
    "gram()": lambda A, X, S: A.from_inner(),
    "trace()": lambda A, X, S: A.average_trace(),
    "add_scaled_identity(1)": lambda A, X, S: A.diag_add_(0.0),
}

BUDGET, FEWEST, MOST = 0.1, 3, 41  # seconds and calls for a case


class Case(NamedTuple):
    """What is measured: one row of the table."""

    structure: str
    dtype: str
    n: int
    rows: int  # columns of X; 0 where the operation takes none
    operation: str


@functools.lru_cache(8)
def operands(n: int, rows: int, dtype: str) -> tuple[Tensor, Tensor]:
    """``X`` and a symmetric ``S``."""
    torch.manual_seed(n)
    X, M = torch.randn(n, max(rows, 1)), torch.randn(n, n)
    return X.to(DTYPES[dtype]), (M + M.mT).to(DTYPES[dtype])


def seconds(call: Callable[[], Any]) -> float:
    """Of one call. A single thread's own time is not that of whatever else the machine does."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return clock() - start


def medians(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Seconds of each of the calls, which take turns."""
    once = sum(max(seconds(call), seconds(call)) for call in calls.values())
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(min(MOST, max(FEWEST, int(BUDGET / once)))):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return {name: statistics.median(taken) for name, taken in times.items()}


# The peer ----------------------------------------------------------------------------------------


def worker() -> None:
    """Answer every case that is read with the median of its seconds."""
    from singd.optim.optimizer import SINGD  # the peer's

    for line in sys.stdin:
        case = Case(*json.loads(line))
        X, S = operands(case.n, case.rows, case.dtype)
        A = SINGD.SUPPORTED_STRUCTURES[PEER[case.structure]].from_dense(S)
        function = PEER_OPERATIONS[case.operation]
        print(medians({"peer": lambda: function(A, X, S)})["peer"], flush=True)  # noqa: B023  # now


class Peer:
    """The other package in a process of its own."""

    def __init__(self, path: Path, threads: int) -> None:
        self.process = subprocess.Popen(
            workers.command("ops"),
            env=workers.environment(path, OMP_NUM_THREADS=str(threads)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, case: Case) -> float:
        """Seconds of one call."""
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("the peer has no pipes")
        print(json.dumps(case), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError("the peer has ended")
        return float(answer)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


# The roofline ------------------------------------------------------------------------------------


class Roofline(NamedTuple):
    """Bytes and floating-point operations per second."""

    bandwidth: float
    rate: float

    def seconds(self, data: float, flops: float) -> float:
        return max(data / self.bandwidth, flops / self.rate)


def roofline(dtype: torch.dtype) -> Roofline:
    """Of a copy of 64 MiB and of a product of size 2048, on this machine, now."""
    source = torch.ones((1 << 26) // dtype.itemsize, dtype=dtype)
    target, M = torch.empty_like(source), torch.randn(2048, 2048).to(dtype)
    copy = min(seconds(lambda: target.copy_(source)) for _ in range(10))
    product = min(seconds(lambda: M @ M) for _ in range(10))
    return Roofline(2 * source.nbytes / copy, 2 * 2048**3 / product)


class Flops(TorchDispatchMode):
    """Floating-point operations of the matrix products and FFTs that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            self.total += 2 * work(func, args, out)
        elif name.startswith("_fft"):
            self.total += work(func, args, out)
        return out


def demand(call: Callable[[], Any], *inputs: Any) -> tuple[float, float]:
    """Bytes in and out, and floating-point operations, of a call."""
    with Flops() as flops:
        result = call()
    tensors = [t for t in tree_leaves((inputs, result)) if isinstance(t, Tensor)]
    return float(sum(t.numel() * t.element_size() for t in tensors)), flops.total


# The table ---------------------------------------------------------------------------------------

COLUMNS = (
    *(*Case._fields, "us", "dense us", "ratio", "alone us", "peer us", "peer ratio"),
    *("bytes", "flops", "roofline us", "achieved"),
)


def measure(case: Case, roof: Roofline, peer: Peer | None) -> dict[str, str]:
    """One row: ours, dense and the peer in turn."""
    X, S = operands(case.n, case.rows, case.dtype)
    A = parse(case.structure)(case.n).map(torch.randn_like).add_scaled_identity(1.0).to(X.dtype)
    dense, function = (
        parse("dense")(case.n).with_tensors([A.to_dense()]),
        OPERATIONS[case.operation],
    )
    ours = functools.partial(function, A, X, S)
    found = medians({"us": ours, "dense us": functools.partial(function, dense, X, S)})
    if peer and case.structure in PEER:
        found |= {"alone us": medians({"us": ours})["us"], "peer us": peer.ask(case)}
    data, flops = demand(ours, *reads(case, A, X, S))
    best = roof.seconds(data, flops)
    row = {key: str(value) for key, value in case._asdict().items()}
    row |= {name: f"{1e6 * value:.1f}" for name, value in found.items()}
    row["ratio"] = f"{found['us'] / found['dense us']:.3f}"
    if "peer us" in found:
        row["peer ratio"] = f"{found['alone us'] / found['peer us']:.3f}"
    row |= {"bytes": f"{data:.0f}", "flops": f"{flops:.0f}"}
    row |= {"roofline us": f"{1e6 * best:.2f}", "achieved": f"{best / found['us']:.3f}"}
    return row


def reads(case: Case, A: Any, X: Tensor, S: Tensor) -> list[Any]:
    """What an operation reads."""
    others = {"A @ X": [A, X], "A.mT @ X": [A, X], "project_gram(X)": [X], "A @ B": [A, A]}
    return others.get(case.operation, [S] if case.operation == "project(S)" else [A])


def cases(args: argparse.Namespace) -> list[Case]:
    """Every row to measure."""
    return [
        Case(structure, dtype, n, rows, name)
        for dtype in args.dtypes.split(",")
        for n in map(int, args.sizes.split(","))
        for structure in args.structures.split(";")
        for name in OPERATIONS
        for rows in (map(int, args.rows.split(",")) if name in OF_COLUMNS else [0])
    ]


def key(row: dict[str, str]) -> tuple[Any, ...]:
    """The order of the table."""
    place = [*SPECS, row["structure"]].index(row["structure"])
    operation = list(OPERATIONS).index(row["operation"])
    return row["dtype"], int(row["n"]), place, operation, int(row["rows"])


def save(path: Path, table: list[dict[str, str]]) -> list[dict[str, str]]:
    """Write the rows in place of older ones, keep the others; all of them."""
    kept = {key(row): row for row in read(path)}
    merged = [row for _, row in sorted((kept | {key(row): row for row in table}).items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged)
    return merged


def describe(path: Path, roofs: dict[str, Roofline]) -> None:
    """Write what the table was measured on; rooflines of other runs are kept."""
    old = json.loads(path.read_text()) if path.exists() else {}
    measured = {
        dtype: {"copy GB/s": round(r.bandwidth / 1e9, 1), "product GFLOP/s": round(r.rate / 1e9)}
        for dtype, r in roofs.items()
    }
    described = machine() | {"roofline": old.get("roofline", {}) | measured}
    path.write_text(json.dumps(described, indent=2) + "\n")


def plot(path: Path, table: list[dict[str, str]]) -> None:
    """Ratios to dense over n, one panel for each operation and dtype; rows of X side by side."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    dtypes = sorted({row["dtype"] for row in table})
    with mpl.rc_context({"font.size": 7, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(3.2 * len(OPERATIONS), 3.4 * len(dtypes)), layout="constrained")
        axes = figure.subplots(len(dtypes), len(OPERATIONS), squeeze=False, sharey=True)
        for line, dtype in zip(axes, dtypes, strict=True):
            for ax, name in zip(line, OPERATIONS, strict=True):
                for index, spec in enumerate(SPECS):
                    found = [r for r in table if (r["dtype"], r["operation"]) == (dtype, name)]
                    found = [r for r in found if r["structure"] == spec]
                    style = {"color": mpl.colormaps["tab20"](index), "ms": 4, "lw": 0.8}
                    for rows, mark in zip(
                        sorted({int(r["rows"]) for r in found}), "os^", strict=False
                    ):
                        mine = [r for r in found if int(r["rows"]) == rows]
                        sizes, ratios = ([float(r[c]) for r in mine] for c in ("n", "ratio"))
                        label = spec if mark == "o" else None
                        ax.plot(sizes, ratios, f"-{mark}", label=label, **style)
                ax.axhline(1, color="black", lw=1, ls=":")
                ax.set(xscale="log", yscale="log", title=f"{name}, {dtype}", xlabel="n")
            line[0].set_ylabel("time / dense (circles, squares, triangles: fewer to more rows)")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False)
        figure.savefig(path, dpi=70)


def report(table: list[dict[str, str]]) -> None:
    """What is slower than dense."""
    slower = [row for row in table if float(row["ratio"]) > 1.0]
    for row in slower:
        print(*(row.get(name, "").rjust(9) for name in COLUMNS[4:9]), *list(row.values())[:4])
    print(f"{len(table) - len(slower)} of {len(table)} at most as slow as dense")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="512,1024,2048")
    parser.add_argument("--rows", default="64,256,1024")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--structures", default=";".join(SPECS), help="separated by semicolons")
    parser.add_argument("--peer", type=Path, help="where PyPI singd 0.0.5 is installed")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ops.csv"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        worker()
        return
    torch.set_num_threads(args.threads)
    roofs = {dtype: roofline(DTYPES[dtype]) for dtype in args.dtypes.split(",")}
    peer = Peer(args.peer, args.threads) if args.peer else None
    try:
        table = [measure(case, roofs[case.dtype], peer) for case in tqdm(cases(args))]
    finally:
        if peer:
            peer.close()
    merged = save(args.out, table)
    describe(args.out.with_suffix(".json"), roofs)
    plot(args.out.with_suffix(".png"), merged)
    report(table)


if __name__ == "__main__":
    workers.restart("ops")  # as its peer does
    main()
