"""What factors in fewer bits cost: bytes of K and C, and the time of a step.

::

    python -m benchmarks.storage

Three linear layers of a width on a batch of 256, one thread. Forms take turns, and times are
medians of ratios to the step with float32 factors next to it, in seconds of the processor.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.results import RESULTS, Row, keep
from singd import SINGD

FORMS: dict[str, Any] = {
    "float32": torch.float32,
    "float32, no products": torch.float32,
    "bfloat16": torch.bfloat16,
    "bfloat16+8": "bfloat16+8",
    "int8": "int8",
}
STRUCTURES = (
    *("dense", "lower_triangular", "hierarchical(16, 16)", "block_diagonal(32)", "diagonal"),
)
BATCH, LAYERS = 256, 3


class Run:
    """A model in training with factors in one form."""

    def __init__(self, width: int, structure: str, form: str, T: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(LAYERS)))
        self.x = torch.randn(BATCH, width)
        self.optimizer = SINGD(
            self.model,
            T=T,
            burn_in=0,
            structures=(structure, structure),
            preconditioner_dtype=(FORMS[form], FORMS[form]),
            keep_products="no products" not in form,
        )

    def seconds(self, steps: int) -> float:
        """The time of one step, with its passes."""
        start = time.process_time()
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model(self.x).square().mean().backward()
            self.optimizer.step()
        return (time.process_time() - start) / steps

    def factor_bytes(self) -> int:
        """Bytes of K and C of all layers."""
        entries = [self.optimizer.state[m.weight] for m in self.model]
        return sum(t.nbytes for entry in entries for name in "KC" for t in entry[name])


def rows(width: int, T: int, turns: int) -> list[Row]:
    """A row for each structure and form."""
    found = []
    for structure in STRUCTURES:
        runs = {form: Run(width, structure, form, T) for form in FORMS}
        for run in runs.values():
            run.seconds(T)
        ratios: dict[str, list[float]] = {form: [] for form in FORMS}
        plain = []
        for _ in range(turns):
            for form, run in runs.items():
                plain.append(runs["float32"].seconds(T))
                ratios[form].append(run.seconds(T) / plain[-1])
        for form, run in runs.items():
            found.append(
                {
                    "structure": structure,
                    "width": width,
                    "T": T,
                    "factors": form,
                    "bytes of factors": run.factor_bytes(),
                    "step over float32": f"{statistics.median(ratios[form]):.2f}",
                    "ms, float32": f"{1e3 * statistics.median(plain):.2f}",
                }
            )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 768])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--T", type=int, nargs="+", default=[1, 10])
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for width in given.widths:
        for T in given.T:
            table = rows(width, T, given.turns)
            keep(RESULTS / "storage.csv", table, ("structure", "width", "T", "factors"))
            for row in table:
                print(*row.values(), sep="\t", flush=True)


if __name__ == "__main__":
    main()
