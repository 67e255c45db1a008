"""What the operations of every structure cost, counted instead of timed.

::

    python -m docs.costs

The operations run on the meta device, without data, at three sizes. Counted are multiply-adds of
matrix products, ``5/2 L log2 L`` for a real FFT of length ``L`` (twice that for a complex one), and
elements read or written, whichever are more, by everything else that is not a view. The count is
then written as its leading term, ``c f(n)``: the ``f`` that leaves ``c`` most nearly constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from docs import catalogue
from structured import Structure, StructuredMatrix, parse

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
}

Operation = Callable[[StructuredMatrix, Tensor], Any]

OPERATIONS: dict[str, Operation] = {
    "`A @ X`": lambda A, X: A.apply(X),
    "`A.mT @ X`": lambda A, X: A.apply_transpose(X),
    "`A @ B`": lambda A, X: A.matmul(A),
    "`project_gram(X)`": lambda A, X: A.project_gram(X),
    "`gram()`": lambda A, X: A.gram(),
    "`trace()`": lambda A, X: A.trace(),
}
PER_COLUMN = ("`A @ X`", "`A.mT @ X`", "`project_gram(X)`")  # of X

PRODUCTS = {
    **dict.fromkeys(("mm", "bmm", "mv"), (0, 1)),
    **dict.fromkeys(("addmm", "addmm_", "baddbmm", "baddbmm_"), (1, 2)),
}
CUBIC = ("linalg_solve_ex", "_linalg_solve_ex", "linalg_lu_factor_ex", "linalg_cholesky_ex")
FREE = (
    "_unsafe_view",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
)


class Count(TorchDispatchMode):
    """Adds up the work of every operation that reaches PyTorch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.total += work(func, args, out)
        return out


def work(func: Any, args: Any, out: Any) -> float:
    """The cost of one call."""
    name = func.overloadpacket.__name__
    if func.is_view or name in FREE:
        return 0.0
    sizes = [t.numel() for t in tree_leaves((args, out)) if isinstance(t, Tensor)]
    if name in PRODUCTS:
        first, second = (args[i] for i in PRODUCTS[name])
        return float(first.numel() * (second.shape[-1] if name != "mv" else 1))
    if name.startswith("_fft"):
        length = max(t.shape[args[1][-1]] for t in (args[0], out))
        batch = max(sizes) / max(t.shape[args[1][-1]] for t in (args[0], out))
        return batch * length * math.log2(max(length, 2)) * (5.0 if name == "_fft_c2c" else 2.5)
    if name in CUBIC:
        return float(args[0].numel() * args[0].shape[-1])
    return float(max(sizes, default=0))


def count(operation: Operation, A: StructuredMatrix, columns: int = COLUMNS) -> float:
    """The cost of one operation with a matrix ``X`` of so many columns."""
    X = torch.empty(*A.batch_shape, A.n, columns, dtype=A.dtype, device=A.device)
    with torch.no_grad(), Count() as counter:
        operation(A, X)
    return counter.total


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
