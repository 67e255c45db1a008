"""What makes no sense is an error: the law, and the calls that it makes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from structured._core.matrix import StructuredMatrix
from structured._core.spec import Structure
from structured.dense import Dense
from structured.diagonal import Diagonal


def errors(structure: Structure, other: StructuredMatrix, A: StructuredMatrix) -> None:
    """What makes no sense raises, and says what was expected: it never returns a number."""
    for name, wrong in _mistakes(structure, other, A):
        try:
            result = wrong()
        except (TypeError, ValueError) as error:
            said = str(error)
            clear = "unsupported operand" in said or ("expected" in said and "got" in said)
            assert clear, f"{name}: unclear message {said!r}"
        else:
            raise AssertionError(f"{name}: expected an error, got {result!r}")


def _mistakes(
    structure: Structure, other: StructuredMatrix, A: StructuredMatrix
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls that must raise."""
    n, batch, ones = A.n, A.batch_shape, partial(torch.ones, dtype=A.dtype)
    X, S = ones(n, 2), ones(n, n)
    for name in (*_OF_COLUMNS, *_OF_GRAMS, *_OF_SQUARES):
        good = S if name in _OF_SQUARES else X
        wrong: dict[str, Any] = {
            "one row more": ones(n + 1, good.shape[-1]),
            "one dimension": ones(n if name != "solve" else n + 1),
            "float32": good.float(),
            "meta numbers": good.to("meta"),
            "an array": good.numpy(),
            "None": None,
        }
        if name in _OF_SQUARES:
            wrong["one column more"] = ones(n, n + 1)
        if name in _OF_COLUMNS and batch:
            wrong["another batch"] = good.expand(batch[-1] + 2, *good.shape)
        for what, value in wrong.items():
            yield f"{name} of {what}", partial(getattr(A, name), value)

    unlike: type[StructuredMatrix] = Diagonal if isinstance(A, Dense) else Dense
    members = {
        "structure": unlike.zeros(n, batch_shape=batch, dtype=A.dtype),
        "dtype": A.to(torch.float32),
        "device": A.to("meta"),
    }
    a_tensor: Any = S
    for name in ("A.matmul(B)", "tr(A B)"):
        yield f"{name} of a tensor", partial(_BINARY[name], A, a_tensor)
    if batch:
        another = (*batch[:-1], batch[-1] + 2)  # which does not broadcast with ours
        members["batch shape"] = structure(n, batch_shape=another, dtype=A.dtype)
    if other.n != n:
        members["size"] = structure(other.n, batch_shape=batch, dtype=A.dtype)
    for what, member in members.items():
        for name, operation in _BINARY.items():
            yield f"{name} of another {what}", partial(operation, A, member)

    scalars: Any = ones(*batch, 5)
    a_list: Any = [1.0]
    yield "A * c, one c too many", partial(operator.mul, A, scalars)
    yield "c * A, one c too many", partial(operator.mul, scalars, A)
    yield "A / c, one c too many", partial(operator.truediv, A, scalars)
    yield "A + c I, one c too many", partial(A.add_scaled_identity, scalars)
    yield "A + c I, c a list", partial(A.add_scaled_identity, a_list)
    for what, c in {"meta": ones((), device="meta"), "complex": torch.tensor(1j)}.items():
        yield f"A * c, c {what}", partial(operator.mul, A, c)
        yield f"A / c, c {what}", partial(operator.truediv, A, c)
        yield f"A + c I, c {what}", partial(A.add_scaled_identity, c)
    for dtype in (torch.int64, torch.complex64):
        yield f"zeros in {dtype}", partial(structure, n, dtype=dtype)
    yield "A + 1", partial(operator.add, A, 1)
    yield "A * A", partial(operator.mul, A, A)
    yield "with_tensors, one too many", partial(A.with_tensors, [*A.tensors(), X])


_OF_COLUMNS = ("apply", "apply_transpose", "solve")
_OF_GRAMS = ("project_gram", "orthogonal_project_gram")
_OF_SQUARES = ("project", "orthogonal_project")
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "A @ B": operator.matmul,
    "A.matmul(B)": lambda A, B: A.matmul(B),
    "tr(A B)": lambda A, B: A.trace_product(B),
    "A + B": operator.add,
    "A - B": operator.sub,
}
