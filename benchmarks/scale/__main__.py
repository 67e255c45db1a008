"""What optimizers cost on many GPUs, calculated; every assumption is an argument.

::

    python -m benchmarks.scale
    python -m benchmarks.scale --models 70B --gpus 64 256 1024 --bandwidth 25e9 --sample 8
    python -m benchmarks.scale --check

State is what the GPU with most keeps between steps beside parameters and gradients, buffers are
statistics that it holds after the backward pass of a step that updates factors; the time is what a
step takes longer than forward and backward passes, in percent of these. SINGD's work is
counted on its own code, run on shapes without data; its places are those that the library chooses.
Tensor parallelism (``--tensor``) is calculated with factors of each GPU's part of a weight; the
library has these where the structure of the side fits, else those of whole weights on every GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS, Row, keep
from benchmarks.scale.methods import Estimate, adamw, muon, shampoo, singd, soap
from benchmarks.scale.models import MODELS, Assumptions, Matrix

SETTINGS = (("1B", 64, 1), ("8B", 256, 1), ("70B", 1024, 1), ("405B", 4096, 1))
"""Models, numbers of GPUs, and how many of these tensor parallelism takes."""

Make = Callable[[Sequence[Matrix], int, float, Assumptions], Estimate]


def of_singd(*structures: str, places: str | None = None, **changes: Any) -> Make:
    """SINGD with structures for K and C; those that it has by default if there are none.

    The outputs of a head are as many as tokens: a diagonal there.
    """
    pairs = {"head": (*structures[:1], "diagonal"), "*": structures}
    options: dict[str, Any] = {"structures": pairs} if structures else {}

    def make(matrices: Sequence[Matrix], ranks: int, rows: float, given: Assumptions) -> Estimate:
        return singd(matrices, ranks, rows, replace(given, **changes), options, places)

    return make


LEAN: dict[str, Any] = {"interval": 20, "sample": 8}

METHODS: dict[str, Make] = {
    "AdamW": lambda m, ranks, rows, given: adamw(sum(x.count * x.numbers for x in m), ranks),
    "SINGD": of_singd(),
    "SINGD, lean": of_singd(**LEAN),
    "SINGD, diagonal": of_singd("diagonal", "diagonal"),
    "SINGD, block_diagonal(64)": of_singd("block_diagonal(64)", "block_diagonal(64)"),
    "SINGD, block_diagonal(2048)": of_singd("block_diagonal(2048)", "block_diagonal(2048)"),
    "SINGD, block_diagonal(2048), lean": of_singd(
        "block_diagonal(2048)", "block_diagonal(2048)", **LEAN
    ),
    "SINGD, hierarchical(32, 32)": of_singd("hierarchical(32, 32)", "hierarchical(32, 32)"),
    "SINGD, dense": of_singd("dense", "dense"),
    "SINGD, dense, everywhere": of_singd("dense", "dense", places="everywhere"),
    "SINGD, dense, lean": of_singd("dense", "dense", **LEAN),
    "Muon": muon,
    "Shampoo": shampoo,
    "SOAP": soap,
}
"""Methods; *lean* is T = 20 and statistics of one token in eight."""


def parser() -> argparse.ArgumentParser:
    """The command line: one argument for each assumption."""
    flags = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.scale")
    flags.add_argument("--models", nargs="+", choices=list(MODELS), help="all, as in the table")
    flags.add_argument("--gpus", nargs="+", type=int, help="in place of those of the table")
    flags.add_argument("--tensor", type=int, help="GPUs of tensor parallelism")
    flags.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    for field in fields(Assumptions):
        kind: Any = {"int": int, "float": float}[str(field.type)]
        flags.add_argument(f"--{field.name}", type=kind, default=field.default)
    flags.add_argument("--check", action="store_true", help="compare with runs on four ranks")
    flags.add_argument("--out", type=Path, default=RESULTS)
    return flags


def row(name: str, gpus: int, tensor: int, method: str, given: Assumptions) -> Row:
    """One method in one setting."""
    model, ranks = MODELS[name], gpus // tensor
    matrices = model.matrices(tensor)
    found = METHODS[method](matrices, ranks, given.tokens * tensor, given)
    rest = adamw(model.others(tensor), ranks)
    passes = 6 * model.parameters * given.tokens / (given.peak * given.utilization)
    added = found.seconds(given) + rest.seconds(given)
    own = 8 * sum(
        m.count * m.numbers for m in matrices
    )  # FSDP2: two gathers in bfloat16, a reduction
    return {
        "model": name,
        "gpus": f"{gpus}",
        "tensor": f"{tensor}",
        "method": method,
        "state MB": f"{(found.state + rest.state) / 1e6:.4g}",
        "buffers MB": f"{found.buffers / 1e6:.4g}",
        "sent MB": f"{found.sent / 1e6:.4g}",
        "sent, of FSDP2's": f"{100 * found.sent / own:.3g}%",
        "added ms": f"{1e3 * added:.4g}",
        "of a step": f"{100 * added / passes:.3g}%",
        "places": found.places,
    }


def main(arguments: list[str] | None = None) -> None:
    """Calculate and print a table for each setting, or check."""
    flags = parser().parse_args(arguments)
    if flags.check:
        from benchmarks.scale.check import check  # needs ranks

        print(table(check(flags.out)))
        return
    given = Assumptions(**{field.name: getattr(flags, field.name) for field in fields(Assumptions)})
    rows = [
        row(name, count, flags.tensor or tensor, method, given)
        for name, gpus, tensor in SETTINGS
        if name in (flags.models or MODELS)
        for count in flags.gpus or [gpus]
        for method in flags.methods
    ]
    if given == Assumptions() and not flags.gpus and not flags.tensor:
        keep(flags.out / "scale.csv", rows, ("model", "gpus", "tensor", "method"))
    print(table(rows))


def table(rows: Sequence[Row]) -> str:
    """Columns side by side."""
    head = list(rows[0])
    cells = [head, *([r[k] for k in head] for r in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


if __name__ == "__main__":
    main()
