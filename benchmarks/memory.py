"""Memory of a training step, method by method.

    python -m benchmarks.memory --models vgg,vit --methods singd:diagonal --peer .peer
    python -m benchmarks.memory --device cuda

Every method trains for one period of updates in a process of its own, since PyPI ``singd`` has the
same name as ours. In bytes:

* ``state``: the tensors of the optimizer's state, exactly;
* ``held``: all that is alive between two steps but weights, buffers and the batch: state and what
  is kept besides, such as products of factors;
* ``backward``, ``step``: the most that is alive at once during forward and backward pass, and
  during ``step``, weights and batch included;
* ``extra``: the larger of the two, less that of SGD;
* ``limit``: of ``extra``, what a method of ours promises: the largest input of a layer, what is
  held more than by SGD, and the statistics (as large as the factors, in float32).

On a CPU the storages of all tensors are counted (:mod:`benchmarks.peak`), on CUDA it is what
PyTorch's allocator says. ``memory.csv`` in ``benchmarks/results`` is kept up row by row, with the
machine in ``memory.json`` and a plot in ``memory.png``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import nets, optimizers, workers
from benchmarks.nets import DTYPES
from benchmarks.peak import PeakBytes
from benchmarks.results import RESULTS, Row, keep, read

KEY = ("model", "dtype", "device", "method")
FURTHER = ("singd", "singd:diagonal+embeddings")  # methods
FACTORS = ("K", "C", "S_K", "S_C")  # the state that has the size of the statistics


class Meter(Protocol):
    """What counts bytes that are alive."""

    now: int
    peak: int

    def restart(self) -> None: ...


class CUDA:
    """Bytes by PyTorch's allocator."""

    def restart(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    @property
    def now(self) -> int:
        return torch.cuda.memory_allocated()

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()

    def __enter__(self) -> CUDA:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def measure(
    name: str, model_name: str, dtype: str, device: str, T: int, peer: bool
) -> dict[str, int]:
    """What one method takes in ``T + 1`` steps, of which two update its factors."""
    with PeakBytes() if device == "cpu" else CUDA() as meter:
        model, loss = nets.make(model_name, DTYPES[dtype], device=device)
        before = meter.now
        optimizer = optimizers.make(name, model, T, peer=peer)
        taken = peaks(meter, loss, optimizer, T + 1)
        held = meter.now - before
    state = list(optimizers.state_tensors(optimizer))
    return {
        "state": sum(t.nbytes for t in state),
        "held": held,
        **taken,
        "input": largest_input(model, loss),
        "statistics": sum(4 * t.numel() for t in factors(optimizer)),
    }


def peaks(meter: Meter, loss: Any, optimizer: Any, steps: int) -> dict[str, int]:
    """The highest bytes alive in forward and backward passes, and in steps."""
    most = {"backward": 0, "step": 0}
    for _ in range(steps):
        meter.restart()
        loss().backward()
        most["backward"] = max(most["backward"], meter.peak)
        meter.restart()
        optimizer.step()
        most["step"] = max(most["step"], meter.peak)
        optimizer.zero_grad()
    return most


def factors(optimizer: Any) -> list[Tensor]:
    """The Kronecker factors in the state of our optimizers."""
    lists = [state.get(name, []) for state in optimizer.state.values() for name in FACTORS]
    return [t for found in lists if isinstance(found, list) for t in found]


def largest_input(model: nn.Module, loss: Any) -> int:
    """Bytes of the largest input of a layer with a weight."""
    sizes: list[int] = []
    layers = [m for m in model.modules() if isinstance(getattr(m, "weight", None), Tensor)]
    hooks = [m.register_forward_hook(lambda _, x, __: sizes.append(x[0].nbytes)) for m in layers]
    loss()
    for hook in hooks:
        hook.remove()
    return max(sizes)


# The table ---------------------------------------------------------------------------------------


def ask(name: str, case: tuple[str, str, str], T: int, peer: Path | None) -> dict[str, int]:
    """:func:`measure` in a process of its own, of PyPI ``singd`` if ``peer`` says where it is."""
    done = subprocess.run(
        workers.command("memory", name, *case, str(T), "peer" if peer else ""),
        env=workers.environment(peer),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, int] = json.loads(done.stdout)
    return found


def row(case: tuple[str, str, str], name: str, found: dict[str, int], sgd: dict[str, int]) -> Row:
    """One line of the table."""
    peak, least = (max(f["backward"], f["step"]) for f in (found, sgd))
    out = dict(zip(KEY, (*case, name), strict=True))
    out |= {k: str(found[k]) for k in ("state", "held", "backward", "step")}
    promised = found["input"] + found["held"] - sgd["held"] + found["statistics"]
    ours = name.startswith("singd")
    return out | {"extra": str(peak - least), "limit": str(promised) if ours else ""}


def cases(args: argparse.Namespace) -> list[tuple[tuple[str, str, str], str]]:
    """Model, dtype and device, and the method; SGD first, as others are compared with it."""
    methods = args.methods.split(",") if args.methods else [*optimizers.names(), *FURTHER]
    if args.peer and not args.methods:
        methods += [f"PyPI {name}" for name in optimizers.OURS]
    return [
        ((model, dtype, args.device), method)
        for dtype in args.dtypes.split(",")
        for model in args.models.split(",")
        for method in ["sgd", *(m for m in methods if m != "sgd")]
    ]


def plot(path: Path, table: Sequence[Row]) -> None:
    """Extra peak memory and state, a panel for each model."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    table = [r for r in table if r["dtype"] == "fp32"] or table
    models = list(dict.fromkeys(r["model"] for r in table))
    with mpl.rc_context({"font.size": 7, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(3.6 * len(models), 4.2), layout="constrained")
        for ax, model in zip(
            figure.subplots(1, len(models), squeeze=False)[0], models, strict=True
        ):
            rows = [r for r in table if r["model"] == model][::-1]
            places = range(len(rows))
            for column, height, shift in (("extra", 0.4, 0.2), ("state", 0.4, -0.2)):
                values = [int(r[column]) / 1e6 for r in rows]
                ax.barh([p + shift for p in places], values, height, label=column)
            marks = [(p + 0.2, int(r["limit"]) / 1e6) for p, r in enumerate(rows) if r["limit"]]
            ax.plot(
                [x for _, x in marks], [y for y, _ in marks], "k|", ms=7, label="limit of extra"
            )
            ax.set_yticks(list(places), [r["method"] for r in rows])
            ax.set(title=model, xlabel="MB")
        figure.legend(
            *ax.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3
        )
        figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.memory", description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="mlp,gpt,vit,vgg")
    parser.add_argument("--methods", help="all, and those of PyPI singd, if not given")
    parser.add_argument("--dtypes", default="fp32")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--T", type=int, default=10)
    parser.add_argument("--peer", type=Path, help="where PyPI singd 0.0.5 is installed")
    parser.add_argument("--out", type=Path, default=RESULTS / "memory.csv")
    parser.add_argument("--worker", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        *case, T, peer = args.worker
        print(json.dumps(measure(*case, int(T), bool(peer))))
        return
    sgd: dict[str, int] = {}
    bar = tqdm(cases(args))
    for case, method in bar:
        bar.set_postfix_str(f"{case[0]} {method}")
        name = method.removeprefix("PyPI ")
        found = ask(name, case, args.T, args.peer if name != method else None)
        sgd = found if method == "sgd" else sgd
        keep(args.out, [row(case, method, found, sgd)], KEY)
    table = read(args.out)
    plot(args.out.with_suffix(".png"), table)
    for line in table:
        print(*(value.ljust(12) for value in line.values()))


if __name__ == "__main__":
    main()
