"""Checks of arguments, before anything is computed: what was expected, and what was given."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from structured._core.operator import Operator
from structured._core.stored import Stored


def check_columns(A: Operator, X: Any, operation: str) -> tuple[Any, Any]:
    """Raise unless ``X`` is ``[..., n, m]`` of our dtype and device, its batch shape like ours."""
    check_rows(A, X, operation)
    if X.ndim == 2:
        return A, X
    ours, theirs = A.batch_shape, X.shape[:-2]
    for mine, its in zip(reversed(ours), reversed(theirs), strict=False):
        if mine != its and mine != 1 and its != 1:
            raise ValueError(
                f"{_name(A, operation)}: expected a batch shape that broadcasts with "
                f"{list(ours)}, got {list(theirs)}"
            )
    return A, X


def check_rows(A: Operator, X: Any, operation: str) -> tuple[Any, Any]:
    """Raise unless ``X`` is ``[..., n, m]`` of our dtype and device."""
    if not isinstance(X, Tensor):
        _raise_type(A, X, operation)
    if X.ndim < 2 or X.shape[-2] != A.n:
        _raise_shape(A, X, operation, "m")
    _check_kind(A, X, operation)
    return A, X


def check_square(A: Operator, S: Any, operation: str) -> tuple[Any, Any]:
    """Raise unless ``S`` is ``[..., n, n]`` of our dtype and device."""
    if not isinstance(S, Tensor):
        _raise_type(A, S, operation)
    if S.ndim < 2 or S.shape[-2:] != (A.n, A.n):
        _raise_shape(A, S, operation, A.n)
    _check_kind(A, S, operation)
    return A, S


def check_member(A: Any, B: Any, operation: str) -> tuple[Any, Any]:
    """Both with one batch shape; raise unless ``B`` has our structure, size, dtype and device."""
    layout = getattr(B, "layout", None)
    if not isinstance(layout, tuple):  # tensors have a layout of another kind
        raise TypeError(
            f"{_name(A, operation)}: expected a member of the same structure, "
            f"got {type(B).__name__}"
        )
    if A.layout != layout:
        A, B = _broadcast(A, B, operation)
    _check_kind(A, B, operation)
    return A, B


_LAZILY = {"+": "Sum(A, B)", "-": "Sum(A, -B)", "matmul": "Product(A, B)"}


def _broadcast(A: Any, B: Any, operation: str) -> tuple[Any, Any]:
    """Members of one structure along their joint batch shape."""
    shapes = A.batch_shape, B.batch_shape
    cores = (M.layout_without(len(s)) for M, s in zip((A, B), shapes, strict=True))
    if type(A) is not type(B) or len({*cores}) > 1:
        lazily = f"; {_LAZILY[operation]} is an operator" if operation in _LAZILY else ""
        raise ValueError(
            f"{operation}: expected two members of one structure, got {A!r} and {B!r}{lazily}"
        )
    try:
        joint = torch.broadcast_shapes(*shapes)
    except RuntimeError:
        raise ValueError(
            f"{operation}: expected batch shapes that broadcast, "
            f"got {list(shapes[0])} and {list(shapes[1])}"
        ) from None
    return A.expand(*joint), B.expand(*joint)


def check_scalar(A: Operator, c: Any, operation: str) -> tuple[Any, Any]:
    """Raise unless ``c`` is a number, or a tensor of our device, scalar or of the batch shape."""
    name = _name(A, operation)
    if not isinstance(c, Tensor):
        if not isinstance(c, Real):
            raise TypeError(f"{name}: expected a number or a tensor, got {type(c).__name__}")
        return A, c
    if c.ndim and c.shape != A.batch_shape:
        raise ValueError(
            f"{name}: expected a scalar or shape {list(A.batch_shape)}, got {list(c.shape)}"
        )
    if c.is_complex():
        raise ValueError(f"{name}: expected a real scalar, got {c.dtype}")
    if c.device != A.device and (c.ndim or c.device.type != "cpu"):  # as of torch.mul
        raise ValueError(f"{name}: expected a scalar on {A.device}, got one on {c.device}")
    return A, c


def check_pivots(pivots: Tensor) -> None:
    """Raise if one of ``pivots [..., k]`` is zero, as :func:`torch.linalg.solve` would.

    On a GPU that waits for the numbers; compiled and under ``vmap`` it holds as well.

    Raises:
        torch.linalg.LinAlgError: If one is zero.
    """
    _check_matrices((pivots.detach() == 0).any(-1), "linalg.solve")


def check_definite(failed: Tensor) -> None:
    """Raise the error of a Cholesky factor if one of ``failed [...]`` holds.

    Raises:
        torch.linalg.LinAlgError: That a matrix is not positive definite. The order of the minor is
            not known, and is said to be the first.
    """
    _check_matrices(failed, "linalg.cholesky")


def _check_matrices(failed: Tensor, name: str) -> None:
    # The operator that torch.linalg calls; a comparison in Python would break graphs.
    torch._linalg_check_errors(failed.to(torch.int32), name, is_matrix=failed.ndim == 0)


def _check_kind(A: Operator | Stored, other: Any, operation: str) -> None:
    """Raise unless dtype and device are ours."""
    if other.dtype != A.dtype or other.device != A.device:
        raise ValueError(
            f"{_name(A, operation)}: expected {A.dtype} on {A.device}, got {other.dtype} "
            f"on {other.device}"
        )


def _name(A: object, operation: str) -> str:
    """``Dense.apply``, ``Dense *``."""
    return f"{type(A).__name__}{'.' if operation.isidentifier() else ' '}{operation}"


def _raise_type(A: object, X: Any, operation: str) -> NoReturn:
    raise TypeError(f"{_name(A, operation)}: expected a tensor, got {type(X).__name__}")


def _raise_shape(A: Operator, X: Tensor, operation: str, columns: int | str) -> NoReturn:
    raise ValueError(
        f"{_name(A, operation)}: expected shape [..., {A.n}, {columns}], got {list(X.shape)}"
    )


CHECKS: dict[str, Callable[[Any, Any, str], tuple[Any, Any]]] = {
    "matmul": check_member,
    "trace_product": check_member,
    "congruence": check_member,
    "solve_member": check_member,
    "apply": check_columns,
    "apply_transpose": check_columns,
    "solve": check_columns,
    "orthogonal_project": check_square,
    "project": check_square,
    "project_gram": check_rows,
    "orthogonal_project_gram": check_rows,
    "add_scaled_identity": check_scalar,
}


def check_arguments(cls: type, names: Iterable[str] = CHECKS) -> None:
    """Wrap the methods that ``cls`` defines itself: their argument is checked before they run."""
    for name in {*names} & cls.__dict__.keys():
        method = _checked(name, cls.__dict__[name])
        setattr(cls, name, _of_anything(method) if name == "solve" else method)


def _checked(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    check = CHECKS[name]

    @functools.wraps(method)
    def wrapper(self: Any, argument: Any) -> Any:
        self, argument = check(self, argument, name)
        return method(self, argument)

    return wrapper


def _of_anything(solve: Callable[..., Any]) -> Callable[..., Any]:
    """A ``solve`` of columns that takes a vector ``[n]``, and that of a member one, as well."""

    @functools.wraps(solve)
    def wrapper(self: Any, X: Any) -> Any:
        solve_member = getattr(self, "solve_member", None)
        if isinstance(X, Stored) and solve_member is not None:
            return solve_member(X)
        is_vector = isinstance(X, Tensor) and X.ndim == 1
        return solve(self, X[:, None])[..., 0] if is_vector else solve(self, X)

    return wrapper
