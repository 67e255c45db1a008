"""What each stage of the page "Adding a structure" gains.

::

    python -m docs.stages
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from docs import costs, snippets
from structured import StructuredMatrix

PAGE = Path(__file__).parent / "structured" / "new-structure.md"
CLASSES = {"Cross": "two methods", "FasterCross": "products", "FastCross": "projections"}
SIZES, COLUMNS, REPEATS = (256, 512, 1024), 64, 5


def random_member(cls: type[StructuredMatrix], n: int) -> StructuredMatrix:
    return cls.zeros(n).map(torch.randn_like)


def seconds(operation: costs.Operation, A: StructuredMatrix) -> float:
    """The fastest of a few runs."""
    X, times = torch.randn(A.n, COLUMNS), []
    for _ in range(REPEATS):
        start = time.perf_counter()
        operation(A, X)
        times.append(time.perf_counter() - start)
    return min(times)


def cell(operation: costs.Operation, cls: type[StructuredMatrix]) -> str:
    """``2 n², 310 µs``: the count for all columns and the time at the largest size."""
    members = {n: random_member(cls, n) for n in SIZES}
    for A in members.values():
        operation(A, torch.randn(A.n, COLUMNS))  # what is found once for a size is not counted
    counted = costs.term({n: costs.count(operation, A, COLUMNS) for n, A in members.items()})
    return f"{counted}; {written(seconds(operation, members[max(SIZES)]))}"


def written(duration: float) -> str:
    """A time with two digits."""
    return f"{duration * 1e3:.2g} ms" if duration >= 1e-3 else f"{duration * 1e6:.0f} µs"


def markdown() -> str:
    """The table in Markdown."""
    namespace, threads = snippets.run(PAGE, "class "), torch.get_num_threads()
    torch.set_num_threads(1)
    head = [f"n = {max(SIZES)}", *(f"`{name}`: {what}" for name, what in CLASSES.items())]
    lines = [head, ["---", *["--:"] * len(CLASSES)]]
    for name, operation in costs.OPERATIONS.items():
        lines.append([name, *(cell(operation, namespace[word]) for word in CLASSES)])
    torch.set_num_threads(threads)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


if __name__ == "__main__":
    print(markdown())
