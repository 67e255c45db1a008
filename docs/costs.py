"""The table of what operations cost, counted by :mod:`structured.costs`.

::

    python -m docs.costs

The operations run at three sizes. A count is then written as its leading term, ``c f(n)``: the
``f`` that leaves ``c`` most nearly constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from docs import catalogue
from structured import Structure, StructuredMatrix, parse
from structured.costs import OPERATIONS as COUNTED
from structured.costs import Operation, operation_cost

SIZES, COLUMNS = (245760, 491520, 983040), 256
FEWER = (2048, 4096, 8192)  # where all pairs of rows are looked at once, on the CPU

FORMS: dict[str, Callable[[float], float]] = {
    "1": lambda n: 1.0,
    "n": lambda n: n,
    "n log n": lambda n: n * math.log2(n),
    "n log² n": lambda n: n * math.log2(n) ** 2,
    "n²": lambda n: n**2,
    "n² log n": lambda n: n**2 * math.log2(n),
    "n³": lambda n: n**3,
}

# Of a size that is used: the examples of the catalogue are small, to be drawn.
SPECS = {
    "block_circulant": "block_circulant(30)",
    "block_diagonal": "block_diagonal(30)",
    "group_algebra": "group_algebra(30)",
    "hierarchical": "hierarchical(15, 15)",
    "incidence": "incidence(ancestors)",
    "kron": "kron(circulant, dense, 30)",
    "low_rank_lower": "low_rank_lower(30)",
    "low_rank_upper": "low_rank_upper(30)",
    "strided": "strided(30, diagonal)",
    "tied": "tied(30, diagonal)",
    "block_lower": "block_lower(dense, diagonal, 30)",
    "block_upper": "block_upper(diagonal, dense, -30)",
    "direct_sum": "direct_sum(dense, diagonal, 30)",
    "transposed": "transposed(hierarchical(15, 15))",
    "up_to": "up_to(8192, block_diagonal(30), diagonal)",
}

OPERATIONS: dict[str, Operation] = {
    "`A @ X`": COUNTED["apply"],
    "`A.mT @ X`": COUNTED["apply_transpose"],
    "`A @ B`": COUNTED["matmul"],
    "`project_gram(X)`": COUNTED["project_gram"],
    "`gram()`": COUNTED["gram"],
    "`trace()`": COUNTED["trace"],
}
PER_COLUMN = ("`A @ X`", "`A.mT @ X`", "`project_gram(X)`")  # of X


def count(operation: Operation, A: StructuredMatrix, columns: int = COLUMNS) -> float:
    """The multiply-adds of one operation with a matrix of so many columns."""
    return operation_cost(operation, A, columns).multiply_adds


def leading_term(counts: dict[int, float]) -> tuple[float, str]:
    """``(c, f)`` with ``c f(n)`` nearest to the counts, by the change of ``c`` with n."""

    def drift(form: str) -> float:
        ratios = [c / FORMS[form](n) for n, c in counts.items()]
        return max(ratios) / max(min(ratios), 1e-300)

    best = min(FORMS, key=drift)
    n = max(counts)
    return counts[n] / FORMS[best](n), best


def term(counts: dict[int, float]) -> str:
    """``31 n``."""
    if not any(counts.values()):
        return "0"
    c, form = leading_term(counts)
    number = f"{c:.2g}" if c < 99.5 else f"{c:.0f}"
    text = number if form == "1" else form if number == "1" else f"{number} {form}"
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def row(structure: Structure) -> list[str]:
    """Storage and the cost of every operation."""
    sizes = FEWER if "incidence" in str(structure) else SIZES
    members = {n: structure(n, device="meta") for n in sizes}
    out = [term({n: A.numel() for n, A in members.items()})]
    for name, operation in OPERATIONS.items():
        divisor = COLUMNS if name in PER_COLUMN else 1
        out.append(term({n: count(operation, A) / divisor for n, A in members.items()}))
    return out


def spec(name: str) -> str:
    """The structure that stands for ``name`` in the table."""
    return SPECS.get(name, catalogue.example(name))


def rows() -> dict[str, list[str]]:
    """The rows of the table, by name."""
    return {name: [f"`{spec(name)}`", *row(parse(spec(name)))] for name in catalogue.names()}


def head() -> list[str]:
    """The head of the table; what is counted for each column of X has a star."""
    starred = [f"{name} *" if name in PER_COLUMN else name for name in OPERATIONS]
    return ["structure", "numbers", *starred]


def markdown(rows: dict[str, list[str]]) -> str:
    """The table in Markdown; products with A and with its transpose share a column."""
    lines = [joined(head()), ["---", *["--:"] * len(OPERATIONS)], *map(joined, rows.values())]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def joined(cells: list[str]) -> list[str]:
    """Cells of which the third and the fourth are one, said once if they are equal."""
    both = ", ".join(dict.fromkeys(cells[2:4]))
    return [*cells[:2], both, *cells[4:]]


if __name__ == "__main__":
    print(markdown(rows()))
