"""Every operation of a member, as a table: what the laws of good conduct go through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from structured._core.matrix import StructuredMatrix


class Operation(NamedTuple):
    """An operation, and the magnitude ``|op|(|A|, |X|)`` that its rounding errors go by.

    ``magnitude`` sees members as dense matrices and everything in absolute value.
    """

    compute: Callable[[Any], Any]
    magnitude: Callable[[Any], Tensor]


# No derivative where two entries, or two singular values, tie.
KINKED = ("max_abs", "spectral_norm")

OPERATIONS = {
    "matmul": Operation(lambda o: o.A.matmul(o.B), lambda o: o.A @ o.B),
    "A + B": Operation(lambda o: o.A + o.B, lambda o: o.A + o.B),
    "A - B": Operation(lambda o: o.A - o.B, lambda o: o.A + o.B),
    "3 * A": Operation(lambda o: 3 * o.A, lambda o: 3 * o.A),
    "A / 3": Operation(lambda o: o.A / 3, lambda o: o.A),
    "apply": Operation(lambda o: o.A.apply(o.X), lambda o: o.A @ o.X),
    "apply_overwriting": Operation(
        lambda o: o.A.apply_overwriting(o.X.clone()), lambda o: o.A @ o.X
    ),
    "apply_rows": Operation(lambda o: _apply_rows(o.A, o.X), lambda o: o.A @ o.X),
    "apply_transpose": Operation(lambda o: o.A.apply_transpose(o.X), lambda o: o.A.mT @ o.X),
    "orthogonal_project": Operation(lambda o: o.A.orthogonal_project(o.S), lambda o: o.S),
    "project": Operation(lambda o: o.A.project(o.S), lambda o: 2 * o.S),
    "project_gram": Operation(lambda o: o.A.project_gram(o.X), lambda o: 2 * o.X @ o.X.mT),
    "orthogonal_project_gram": Operation(
        lambda o: o.A.orthogonal_project_gram(o.X), lambda o: o.X @ o.X.mT
    ),
    "gram": Operation(lambda o: o.A.gram(), lambda o: 2 * o.A.mT @ o.A),
    "outer": Operation(lambda o: o.A.outer().apply(o.X), lambda o: o.A @ (o.A.mT @ o.X)),
    "squared_rows": Operation(lambda o: o.A.squared_rows(), lambda o: o.A.square().sum(-1)),
    "congruence": Operation(
        lambda o: _congruence(o.A, o.B), lambda o: 2 * o.A.mT @ (o.B + o.B.mT) @ o.A + o.A
    ),
    "diagonal": Operation(lambda o: o.A.diagonal(), lambda o: o.A.diagonal(dim1=-2, dim2=-1)),
    "trace": Operation(lambda o: o.A.trace(), lambda o: o.A.diagonal(dim1=-2, dim2=-1).sum(-1)),
    "trace_product": Operation(
        lambda o: o.A.trace_product(o.B), lambda o: (o.A * o.B.mT).sum((-2, -1))
    ),
    "add_scaled_identity": Operation(lambda o: o.A.add_scaled_identity(0.5), lambda o: o.A + 0.5),
    "solve": Operation(
        lambda o: o.K.solve(o.X),
        lambda o: torch.linalg.inv(o.K).abs() @ o.K @ torch.linalg.inv(o.K).abs() @ o.X,
    ),
    "solve_transpose": Operation(
        lambda o: o.K.solve_transpose(o.X),
        lambda o: torch.linalg.inv(o.K.mT).abs() @ o.K.mT @ torch.linalg.inv(o.K.mT).abs() @ o.X,
    ),
    "inverse": Operation(
        lambda o: o.K.inverse(),
        lambda o: torch.linalg.inv(o.K).abs() @ o.K @ torch.linalg.inv(o.K).abs(),
    ),
    "exp": Operation(  # as a matrix: a part of size 0 may store a number that has no place in it
        lambda o: (o.A / 8).exp().to_dense(), lambda o: torch.linalg.matrix_exp(o.A / 8)
    ),
    "logdet": Operation(
        lambda o: o.K.logdet(), lambda o: torch.linalg.slogdet(o.K).logabsdet.abs() + o.K.shape[-1]
    ),
    "max_abs": Operation(lambda o: o.K.max_abs(), lambda o: o.K),
    "spectral_norm": Operation(
        lambda o: o.K.spectral_norm(), lambda o: torch.linalg.matrix_norm(o.K)
    ),
    "frobenius_norm": Operation(
        lambda o: o.K.frobenius_norm(), lambda o: torch.linalg.matrix_norm(o.K)
    ),
}


def _apply_rows(A: StructuredMatrix, X: Tensor) -> Tensor:
    """``A X``, the last row given apart where that may be."""
    last = max(A.n - 1, 0)
    rows = X[..., :last, :], X[..., last:, :]
    return torch.cat(A.apply_rows(*rows), -2) if A.rows_apart else A.apply(X)


def _congruence(A: StructuredMatrix, U: StructuredMatrix) -> StructuredMatrix:
    """``Pi(A^T S A)`` where that is known from ``U = Pi(S)``."""
    return A.congruence(U) if A.closed_under_congruence else A.clone()


def tensors_of(result: Any) -> list[Tensor]:
    """The stored tensors of a member, or the tensor itself."""
    return list(result.tensors()) if isinstance(result, StructuredMatrix) else [result]


def dense_of(result: Any) -> Tensor:
    """A member written out, or the tensor itself."""
    dense: Tensor = result.to_dense() if isinstance(result, StructuredMatrix) else result
    return dense
