"""Time of every operation of every structure, relative to the dense one.

    python -m benchmarks.ops --sizes 512,1024 --rows 256

Structure and dense take turns, operation by operation, so that whatever else the machine does falls
on both alike; medians are compared. ``project`` is left out: its argument is dense already.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from structured import StructuredMatrix, parse

SPECS = (
    *("scaled_identity", "diagonal", "block_diagonal(30)", "lower_triangular", "upper_triangular"),
    *("lower_toeplitz", "upper_toeplitz", "circulant", "hierarchical(15, 15)"),
    *("low_rank_upper(30)", "low_rank_lower(-30)", "direct_sum(dense, diagonal, 30)"),
    *("tied(16, dense)", "strided(16, dense)"),
    *("rotated(diagonal, cosine)", "rotated(diagonal, hadamard)"),
)

Operation = Callable[[StructuredMatrix, torch.Tensor], Any]

OPERATIONS: dict[str, Operation] = {
    "A @ X": lambda A, X: A.apply(X),
    "A.mT @ X": lambda A, X: A.apply_transpose(X),
    "A @ B": lambda A, X: A.matmul(A),
    "project_gram(X)": lambda A, X: A.project_gram(X),
    "gram()": lambda A, X: A.gram(),
}


def seconds(operation: Operation, A: StructuredMatrix, X: torch.Tensor) -> float:
    """Of one call."""
    start = time.perf_counter()
    operation(A, X)
    return time.perf_counter() - start


def rows(sizes: list[int], columns: int, repeats: int) -> Iterator[dict[str, str]]:
    """One for each structure, size and operation."""
    cases = [(spec, n) for n in sizes for spec in SPECS]
    for spec, n in tqdm(cases):
        torch.manual_seed(n)
        X = torch.randn(n, columns)
        A = parse(spec)(n).map(torch.randn_like).add_scaled_identity(1.0)
        dense = parse("dense")(n).orthogonal_project(A.to_dense())
        for name, operation in OPERATIONS.items():
            operation(A, X), operation(dense, X)
            pairs = [
                (seconds(operation, A, X), seconds(operation, dense, X)) for _ in range(repeats)
            ]
            ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
            yield {
                "structure": spec,
                "n": str(n),
                "operation": name,
                "us": f"{1e6 * ours:.0f}",
                "dense us": f"{1e6 * theirs:.0f}",
                "ratio": f"{ours / theirs:.3f}",
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="512,1024")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ops.csv"))
    args = parser.parse_args()
    table = list(rows([int(n) for n in args.sizes.split(",")], args.rows, args.repeats))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    slower = [row for row in table if float(row["ratio"]) > 1.0]
    for row in slower:
        print("slower than dense:", *row.values())
    print(f"{len(table) - len(slower)} of {len(table)} operations at most as slow as dense")


if __name__ == "__main__":
    main()
