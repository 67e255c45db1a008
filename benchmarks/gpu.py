"""Tests and measurements on one NVIDIA GPU, in nine minutes at most.

    make gpu

Needs PyTorch with CUDA and Triton, and no network. Parts run in order, the cheap and decisive ones
first; one that fails is written down with its error, one that would pass the deadline is left out,
and both are said. Results go to ``benchmarks/results/<gpu>/``, which the documentation reads.
``--dry-run`` goes the same way at tiny sizes on the CPU, kernels interpreted: a test of this file.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

Row = dict[str, Any]
ROOT = Path(__file__).parents[1]
T = 10
METHODS = ("SGD", "AdamW fused", "SINGD diagonal", "IKFAC", "INGD", "KFAC")
TRANSFORMERS = ("SGD", "AdamW fused", "SINGD diagonal", "SINGD block-diagonal", "INGD")


@dataclass
class Run:
    """One run of this file: where, how large, how long."""

    dry: bool
    out: Path
    limit: float
    started: float = field(default_factory=time.monotonic)
    ceilings: dict[str, float] = field(default_factory=dict)  # GB/s and TFLOP/s

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.limit - (time.monotonic() - self.started)

    def size(self, full: int, dry: int) -> int:
        return dry if self.dry else full

    def seconds(self, function: Callable[[], Any]) -> float:
        """Of one call: the median over about 60 ms on the device, after a warm-up."""
        for _ in range(1 if self.dry else 3):
            function()
        if self.dry:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        first = self._events(function, 1)[0]
        return median(self._events(function, max(5, min(200, int(0.06 / max(first, 1e-6))))))

    def _events(self, function: Callable[[], Any], count: int) -> list[float]:
        marks = [
            [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # start and end
            for _ in range(count)
        ]
        torch.cuda.synchronize()
        for start, end in marks:
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return [1e-3 * start.elapsed_time(end) for start, end in marks]

    def wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()


# The parts --------------------------------------------------------------------------------------


def machine(run: Run) -> list[Row]:
    """The ceilings: a large copy, and large products."""
    n = run.size(8192, 64)
    source = torch.randn(run.size(1 << 30, 1 << 10), device=run.device).bfloat16()
    target = torch.empty_like(source)
    run.ceilings["copy"] = 2e-9 * source.nbytes / run.seconds(lambda: target.copy_(source))
    for dtype in (torch.bfloat16, torch.float32):
        A, B = (torch.randn(n, n, device=run.device).to(dtype) for _ in range(2))
        name = str(dtype).removeprefix("torch.")
        run.ceilings[name] = 2e-12 * n**3 / run.seconds(lambda A=A, B=B: A @ B)
    units = {"copy": "GB/s"}
    return [
        {"ceiling": name, "rate": round(value, 1), "unit": units.get(name, "TFLOP/s")}
        for name, value in run.ceilings.items()
    ]


def tests(run: Run) -> list[Row]:
    """Kernels against their references, and the library on CUDA against itself on the CPU."""
    if run.dry:
        return [{"tests": "left to make test"}]
    command = [sys.executable, "-m", "pytest", "-W", "default", "-p", "no:cacheprovider"]
    command += ["--tb=short", "tests/kernels", "tests/gpu"]
    limit = max(30.0, min(180.0, run.left - 240))
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        text = done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        text = (output.decode() if isinstance(output, bytes) else output) + "\ntimed out"
    (run.out / "tests.txt").write_text(text[-100_000:])
    print(text[-6000:])
    return [{"tests": text.strip().splitlines()[-1] if text.strip() else "no output"}]


def sync(run: Run) -> list[Row]:
    """Whether a step waits for the device, and whether a CUDA graph can hold it."""
    from singd import SINGD

    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for what in ("no wait", "no wait by default", "graph"):
            torch.manual_seed(0)
            layers = [torch.nn.Linear(32, 32) for _ in range(3)]
            model = torch.nn.Sequential(*layers).to(run.device, dtype)
            options: dict[str, Any] = {} if "default" in what else {"max_skipped": None}
            optimizer = SINGD(model, T=1, burn_in=0, **options)
            x = torch.randn(16, 32, device=run.device, dtype=dtype)

            def step(model=model, optimizer=optimizer, x=x) -> None:
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()

            row = {
                "dtype": str(dtype).removeprefix("torch."),
                "what": what,
                "holds": "not tried" if run.dry else "yes",
            }
            try:
                for _ in range(3):
                    step()
                if not run.dry:
                    _held(what, model, optimizer, x, step)
            except Exception as error:
                row["holds"] = f"no: {str(error).strip().splitlines()[-1][:300]}"
            rows.append(row)
    return rows


def _held(what: str, model: Any, optimizer: Any, x: Tensor, step: Callable[[], None]) -> None:
    """Raise unless a step of the optimizer does ``what``."""
    if "no wait" in what:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    before = [p.detach().clone() for p in model.parameters()]
    graph.replay()
    torch.cuda.synchronize()
    if all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True)):
        raise RuntimeError("a replay of the graph does not move the parameters")


def kernels(run: Run) -> list[Row]:
    """Every kernel against its reference."""
    from structured._products import gram
    from structured.kernels import sums_of_squares, symmetric_product

    rows = []
    for n, m in ((4096, 16384), (768, 131072), (27, 131072)):
        for layout in ("rows", "columns"):
            X = _matrix(run, n, m, layout)
            rows.append(
                _compared(
                    run,
                    f"sums of squares, {layout}",
                    X,
                    lambda X=X: sums_of_squares.launch(X),
                    lambda X=X: gram.sums_of_squares(X),
                    moved=X.nbytes,
                )
            )
    for count, n, m in ((25, 30, 131072), (136, 30, 16384)):
        X = _matrix(run, count * n, m, "columns").unflatten(-2, (-1, run.size(n, 4)))
        rows.append(
            _compared(
                run,
                "block gram",
                X,
                lambda X=X: symmetric_product.launch(X),
                lambda X=X: gram.symmetric_product(X),
                moved=X.nbytes,
            )
        )
    for n, m in ((4096, 4096), (4096, 16384), (1024, 8192), (768, 65536), (2304, 8192)):
        for dtype in (torch.bfloat16, torch.float32) if n == 4096 == m else (torch.bfloat16,):
            X = _matrix(run, n, m, "columns", dtype)
            for cut in _tilings()[: run.size(99, 1)]:
                if dtype == torch.float32:
                    cut = cut._replace(depth=cut.depth // 2)  # the same bytes
                try:
                    row = _compared(
                        run,
                        "symmetric product",
                        X,
                        lambda X=X, cut=cut: symmetric_product.launch(X, cut),
                        lambda X=X: X @ X.mT,
                        flops=X.shape[-2] ** 2 * X.shape[-1],
                    )
                except Exception as error:  # a tiling too large for the device
                    row = {"kernel": "symmetric product", "shape": str([n, m])}
                    row["error"] = str(error).strip().splitlines()[-1][:200]
                rows.append({**row, "tiling": " ".join(map(str, cut))})
    return [*rows, *_step_kernels(run)]


def _tilings() -> list[Any]:
    """The one in use, and others of which one may be faster."""
    from structured.kernels.symmetric_product import LARGE, Tiling

    others = [(128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (64, 64, 4, 4)]
    return [LARGE, *(Tiling(*other) for other in others)]


def _step_kernels(run: Run) -> Iterator[Row]:
    from singd.ops import kernels, reference
    from singd.ops.kernels import inner_products, rounding
    from singd.ops.stochastic_rounding import Rounding, name_keys

    noise = Rounding(0, 0)
    n = run.size(4096, 16)
    x = torch.randn(1, n * n, device=run.device)
    keys = name_keys(("K",), run.device), noise.word(run.device)
    yield _compared(
        run,
        "stochastic rounding",
        x,
        lambda: rounding.launch(x, torch.bfloat16, *keys, 0),
        lambda: noise.plain(x, torch.bfloat16, ["K"]),
        moved=6 * x.numel(),
    )
    for k in (1 << 24, 1 << 18):
        u, v = (torch.randn(run.size(k, 50), device=run.device).bfloat16() for _ in range(2))
        yield _compared(
            run,
            "inner product",
            u,
            lambda u=u, v=v: inner_products.launch(u, v, 512).sum(),
            lambda u=u, v=v: torch.dot(u.float(), v.float()),
            moved=4 * len(u),
        )
    sizes = [768 * 768] * 48 + [768 * 3072] * 24 + [768] * 96 + [3072] * 12  # GPT-2's blocks
    numbers = 1e-6, 0.9, 0.1, False
    for dtype in (torch.bfloat16, torch.float32):
        shapes = sizes if not run.dry else [50, 7]
        p, d, b = ([torch.randn(k, device=run.device).to(dtype) for k in shapes] for _ in range(3))
        total = sum(t.nbytes for t in p)
        names = tuple(map(str, range(len(p))))
        keys = name_keys(names, run.device), noise.word(run.device)

        def rounded(
            x: Tensor, dtype: torch.dtype, index: int, names: tuple[str, ...] = names
        ) -> Tensor:
            return noise.plain(x[None], dtype, names[index : index + 1])[0]

        yield _compared(
            run,
            f"{len(p)} parameters, momentum, decay",
            p[0],
            lambda p=p, d=d, b=b, k=keys: kernels.momentum_step_(p, d, b, *numbers, *k),
            lambda p=p, d=d, b=b, r=rounded: reference.momentum_step_(p, d, b, *numbers, r),
            moved=5 * total,
        )


def _matrix(run: Run, n: int, m: int, layout: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    if run.dry:
        n, m = min(n, 36) // 4 * 4, 40
    shape = (n, m) if layout == "rows" else (m, n)
    X = torch.randn(shape, device=run.device).to(dtype)
    return X if layout == "rows" else X.mT


def _compared(
    run: Run,
    name: str,
    X: Tensor,
    kernel: Callable[[], Any],
    reference: Callable[[], Any],
    *,
    moved: float = 0,
    flops: float = 0,
) -> Row:
    """Times of both, and the part of the ceiling that the kernel reaches."""
    ours, theirs = run.seconds(kernel), run.seconds(reference)
    dtype = str(X.dtype).removeprefix("torch.")
    if flops:
        ceiling = 1e12 * run.ceilings.get(dtype, float("nan"))
    else:
        ceiling = 1e9 * run.ceilings.get("copy", float("nan"))
    return {
        "kernel": name,
        "shape": str(list(X.shape)),
        "dtype": dtype,
        "kernel us": round(1e6 * ours, 1),
        "reference us": round(1e6 * theirs, 1),
        "kernel / reference": round(ours / theirs, 3),
        "of the ceiling": round((flops or moved) / ours / ceiling, 3),
    }


def dense(run: Run) -> list[Row]:
    """The dense path of the step at n = 4096: gram, product, preconditioning."""
    from singd import update
    from singd.methods.directions import precondition_by_products, product_of
    from structured import Dense

    n = run.size(4096, 32)
    K, C, G = (torch.randn(n, n, device=run.device).bfloat16() for _ in range(3))
    A, B = Dense(K), Dense(C)
    AA, BB = product_of(A), product_of(B)
    if AA is None or BB is None:
        raise RuntimeError("the product of a dense factor with its transpose is not there")
    work = {
        "project_gram(X)": (lambda: A.project_gram(G), n**3),
        "gram()": (lambda: A.gram(), n**3),
        "A @ B": (lambda: A.matmul(B), 2 * n**3),
        "K K^T G": (lambda: A.apply(A.apply_transpose(G)), 4 * n**3),
        "precondition by products": (lambda: precondition_by_products(AA, BB, G), 4 * n**3),
        "precondition": (lambda: update.precondition(A, B, G), 8 * n**3),
    }
    rows = []
    for name, (function, flops) in work.items():
        seconds = run.seconds(function)
        rate = 1e-12 * flops / seconds
        part = rate / run.ceilings.get("bfloat16", float("nan"))
        row = {"operation": name, "n": n, "us": round(1e6 * seconds, 1)}
        rows.append({**row, "TFLOP/s": round(rate, 1), "of the ceiling": round(part, 3)})
    return rows


def optimizer(method: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    from singd import KFAC, SINGD

    if method == "SGD":
        return torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    if method == "AdamW fused":
        return torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    if method == "KFAC":
        return KFAC(model, lr=1e-6, T=T, max_skipped=None)
    specs = {"SINGD diagonal": "diagonal", "SINGD block-diagonal": "block_diagonal(30)"}
    pair = (specs.get(method, "dense"),) * 2
    return SINGD(
        model,
        lr=1e-6,
        T=T,
        burn_in=0,
        structures=pair,
        kfac_like=method == "IKFAC",
        max_skipped=None,
    )


def steps(*models: str, methods: tuple[str, ...]) -> Callable[[Run], list[Row]]:
    """Time and memory of whole training steps in bfloat16, factors updated at every tenth."""

    def part(run: Run) -> list[Row]:
        rows: list[Row] = []
        for model in models if not run.dry else ("mlp",):
            first: Row | None = None
            for method in methods if not run.dry else methods[::2]:
                if run.left < 20:
                    rows.append({"model": model, "method": method, "error": "no time left"})
                    continue
                try:
                    row = _step_cost(run, model, method)
                except Exception as error:
                    traceback.print_exc()
                    rows.append({"model": model, "method": method, "error": repr(error)[:300]})
                    continue
                first = first or row
                row["time / SGD"] = round(row["ms"] / first["ms"], 3)
                row["memory / SGD"] = round(row["MB"] / first["MB"], 3) if first["MB"] else None
                rows.append(row)
                print("  ", *row.values(), flush=True)
        return rows

    return part


def _step_cost(run: Run, model_name: str, method: str) -> Row:
    from benchmarks import nets

    gc.collect()
    if not run.dry:
        torch.cuda.empty_cache()
    model, loss = nets.make(
        model_name, torch.float32 if run.dry else torch.bfloat16, device=run.device
    )
    count = run.size(T, 1)
    stepper = optimizer(method, model)

    def block() -> float:
        run.wait()
        start = time.perf_counter()
        for _ in range(count):
            stepper.zero_grad()
            loss().backward()
            stepper.step()
        run.wait()
        return (time.perf_counter() - start) / count

    if not run.dry:
        block()
        torch.cuda.reset_peak_memory_stats()
    times, begin = [block()], time.monotonic()
    while not run.dry and len(times) < 12 and time.monotonic() - begin < 6:
        times.append(block())
    peak = 0.0 if run.dry else 1e-6 * torch.cuda.max_memory_allocated()
    state = sum(
        t.nbytes
        for t in torch.utils._pytree.tree_leaves(list(stepper.state.values()))
        if isinstance(t, Tensor)
    )
    row = {"model": model_name, "method": method, "ms": round(1e3 * median(times), 3)}
    spread = round(max(times) / min(times), 3)
    return {**row, "spread": spread, "MB": round(peak, 1), "state MB": round(1e-6 * state, 1)}


PARTS: dict[str, tuple[Callable[[Run], Any], float]] = {  # and the seconds that each takes about
    "machine": (machine, 10),
    "tests": (tests, 90),
    "sync": (sync, 10),
    "kernels": (kernels, 60),
    "dense": (dense, 5),
    "vgg16": (steps("vgg16", methods=METHODS), 45),
    "vit-b16": (steps("vit-b16", methods=TRANSFORMERS), 50),
    "gpt2": (steps("gpt2", methods=TRANSFORMERS), 50),
    "gpt2-medium": (steps("gpt2-medium", methods=TRANSFORMERS), 60),
}


# The run ----------------------------------------------------------------------------------------


def describe(run: Run) -> Row:
    """The machine and the versions."""
    row: Row = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        row["triton"] = triton.__version__
    except ImportError:
        row["triton"] = None
    if not run.dry:
        properties = torch.cuda.get_device_properties(0)
        row |= {"gpu": properties.name, "memory GB": round(1e-9 * properties.total_memory, 1)}
        row |= {"multiprocessors": properties.multi_processor_count, "cuda": torch.version.cuda}
    return row


def write(path: Path, rows: list[Row]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def run_parts(run: Run, names: list[str]) -> int:
    """Run them; the number of those that failed or were left out."""
    report = {"machine": describe(run), "parts": {}}
    missed = 0
    for name in names:
        part, about = PARTS[name]
        start, error = time.monotonic(), None
        if run.left < about:
            error = f"left out: {run.left:.0f} s left, takes about {about:.0f}"
        else:
            print(f"== {name}", flush=True)
            try:
                rows = list(part(run))
                write(run.out / f"{name}.csv", rows)
                for row in rows:
                    print("  ", *(f"{k} {v}" for k, v in row.items()), sep="  ")
            except Exception as problem:
                traceback.print_exc()
                error = f"failed: {problem!r}"[:500]
        missed += error is not None
        status = error or "done"
        report["parts"][name] = {"status": status, "seconds": round(time.monotonic() - start, 1)}
        print(f"== {name}: {status}", flush=True)
        (run.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return missed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--limit", type=float, default=510, help="seconds")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--out", type=Path, help="instead of benchmarks/results/<gpu>")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.parts.split(",") if name not in PARTS]:
        parser.error(f"--parts: expected some of {', '.join(PARTS)}, got {', '.join(unknown)}")
    if args.dry_run:
        os.environ.setdefault("TRITON_INTERPRET", "1")
        out = args.out or ROOT / "benchmarks" / "out" / "gpu"
    elif not torch.cuda.is_available():
        print(f"{sys.executable}: its PyTorch sees no CUDA device (PYTHON=... names another)")
        return 1
    else:
        slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
        out = args.out or ROOT / "benchmarks" / "results" / slug
    out.mkdir(parents=True, exist_ok=True)
    run = Run(args.dry_run, out, args.limit)
    missed = run_parts(run, args.parts.split(","))
    print(f"{out}: {len(args.parts.split(',')) - missed} parts done, {missed} not")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
