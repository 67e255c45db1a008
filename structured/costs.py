"""What operations of a structure cost: counted on the meta device, not timed.

Counted are multiply-adds of matrix products, ``n^3`` for any decomposition of n rows and columns,
``n^2`` for each column of a solve with it (half for a triangular matrix), ``5/2 L log2 L`` for a
real FFT of length ``L`` (twice that for a complex one), and the elements read or written, whichever
are more, of everything else that is not a view. A multiply-add is two floating-point operations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from structured._core.matrix import StructuredMatrix
from structured._core.spec import Structure, StructureLike, parse

Operation = Callable[[StructuredMatrix, Tensor], Any]
"""A function of a member and of a matrix with columns."""

OPERATIONS: dict[str, Operation] = {
    "apply": lambda A, X: A.apply(X),
    "apply_transpose": lambda A, X: A.apply_transpose(X),
    "matmul": lambda A, X: A.matmul(A),
    "project_gram": lambda A, X: A.project_gram(X),
    "gram": lambda A, X: A.gram(),
    "outer": lambda A, X: A.outer().apply(X),
    "add_scaled_identity": lambda A, X: A.add_scaled_identity(1.0),
    "trace": lambda A, X: A.trace(),
    "solve": lambda A, X: A.solve(X),
    "logdet": lambda A, X: A.logdet(),
}
"""What :func:`cost` counts."""

PRODUCTS = {
    **dict.fromkeys(("mm", "bmm", "mv"), (0, 1)),
    **dict.fromkeys(("addmm", "addmm_", "baddbmm", "baddbmm_"), (1, 2)),
}
"""Matrix products, with the places of the matrices among their arguments."""

CUBIC = (
    *("linalg_solve_ex", "_linalg_solve_ex", "linalg_lu_factor_ex", "linalg_cholesky_ex"),
    *("linalg_qr", "cholesky_inverse", "_linalg_eigh", "_linalg_svd", "_linalg_slogdet"),
    *("linalg_inv_ex", "linalg_matrix_exp", "linalg_pinv"),
)
"""Operations that cost the lesser size for every entry of their first argument."""

SOLVES = {
    **dict.fromkeys(("linalg_solve_ex", "_linalg_solve_ex", "linalg_lu_solve"), (0, 1.0)),
    **{"cholesky_solve": (1, 1.0), "linalg_solve_triangular": (0, 0.5)},
}
"""Solves, with the place of the matrix, and the multiply-adds for each entry and column."""

FREE = (
    *("_unsafe_view", "detach", "empty", "empty_like", "empty_strided"),
    *("new_empty", "new_empty_strided"),
)
"""Operations that read and write nothing, beside views."""


@dataclass(frozen=True)
class OperationCost:
    """The cost of one operation.

    Attributes:
        multiply_adds: Multiply-adds, or elements read or written, whichever are more in each part.
        bytes: Bytes read and written by all parts, each part by itself.
    """

    multiply_adds: float
    bytes: float


@dataclass(frozen=True)
class Cost(Mapping[str, OperationCost]):
    """The costs of the members of a structure: a mapping from operations.

    Attributes:
        numbers: How many numbers a member stores.
        bytes: In how many bytes.
        operations: The cost of each operation of :data:`OPERATIONS`.
    """

    numbers: int
    bytes: int
    operations: Mapping[str, OperationCost]

    def __getitem__(self, name: str) -> OperationCost:
        return self.operations[name]

    def __iter__(self) -> Any:
        return iter(self.operations)

    def __len__(self) -> int:
        return len(self.operations)


def cost(
    structure: StructureLike, n: int, *, columns: int = 1, dtype: torch.dtype = torch.float32
) -> Cost:
    """What a member of size ``n`` stores, and what its operations cost.

    >>> cost("block_diagonal(30)", 3000)["matmul"].multiply_adds
    2700000.0

    Args:
        structure: Whatever :func:`structured.parse` takes.
        n: Number of rows.
        columns: Columns of the matrix that operations are given.
        dtype: Data type of the numbers.

    Raises:
        ValueError: If the structure is unknown, or ``n`` or ``columns`` is negative.
    """
    if n < 0 or columns < 0:
        raise ValueError(f"cost: expected n and columns >= 0, got {n} and {columns}")
    return _cost(parse(structure), n, columns, dtype)


@functools.lru_cache(maxsize=1024)
def _cost(structure: Structure, n: int, columns: int, dtype: torch.dtype) -> Cost:
    A: StructuredMatrix = structure(n, device="meta", dtype=dtype)
    counted = {name: operation_cost(op, A, columns) for name, op in OPERATIONS.items()}
    stored = A.tensors()
    return Cost(sum(t.numel() for t in stored), sum(t.nbytes for t in stored), counted)


def operation_cost(operation: Operation, A: StructuredMatrix, columns: int = 1) -> OperationCost:
    """The cost of one operation with a matrix of so many columns.

    Args:
        operation: Function of a member and of a matrix ``[..., n, columns]``.
        A: Member, best on the meta device.
        columns: Number of columns.
    """
    X = torch.empty(*A.batch_shape, A.n, columns, dtype=A.dtype, device=A.device)
    return cost_of(lambda: operation(A, X))


def cost_of(function: Callable[[], Any]) -> OperationCost:
    """The cost of a call of a function, which may work on the meta device.

    >>> X = torch.empty(100, 20, device="meta")
    >>> cost_of(lambda: X @ X.mT)
    OperationCost(multiply_adds=200000.0, bytes=56000.0)

    Args:
        function: Function of nothing, called once without gradients.
    """
    with torch.no_grad(), Count() as counter:
        function()
    return OperationCost(counter.multiply_adds, counter.bytes)


class Count(TorchDispatchMode):
    """Adds up the work of every operation that reaches PyTorch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.multiply_adds = self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.multiply_adds += work(func, args, out)
        if not is_free(func):
            self.bytes += sum(t.nbytes for t in tree_leaves((args, out)) if isinstance(t, Tensor))
        return out


def is_free(func: Any) -> bool:
    """Whether an operator reads and writes nothing."""
    return bool(func.is_view) or func.overloadpacket.__name__ in FREE


def solved(name: str, args: Any, out: Any) -> float:
    """The cost of the solution of an operator of :data:`SOLVES`."""
    where, share = SOLVES[name]
    X = next(t for t in tree_leaves(out) if isinstance(t, Tensor))
    return share * X.numel() * args[where].shape[-1]


def work(func: Any, args: Any, out: Any) -> float:
    """The cost of one call of an operator of PyTorch's dispatcher."""
    name = func.overloadpacket.__name__
    if is_free(func):
        return 0.0
    sizes = [t.numel() for t in tree_leaves((args, out)) if isinstance(t, Tensor)]
    if name in PRODUCTS:
        first, second = (args[i] for i in PRODUCTS[name])
        return float(first.numel() * (second.shape[-1] if name != "mv" else 1))
    if name.startswith("_fft"):
        length = max(t.shape[args[1][-1]] for t in (args[0], out))
        batch = max(sizes) / length
        return batch * length * math.log2(max(length, 2)) * (5.0 if name == "_fft_c2c" else 2.5)
    if name in CUBIC or name in SOLVES:
        cubic = args[0].numel() * min(args[0].shape[-2:]) if name in CUBIC else 0.0
        return cubic + (solved(name, args, out) if name in SOLVES else 0.0)
    return float(max(sizes, default=0))
