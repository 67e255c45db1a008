"""The laws of products in other forms, of which the optimizers make directions.

Written as in ``laws.py``. Those of ``A A^T`` are asserted beside those of ``A``: its operator may
be of another class.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structured._core.matrix import Operator, StructuredMatrix
from structured.testing.laws import assert_close


def apply_overwriting(A: StructuredMatrix, X: Tensor) -> None:
    """``A X`` and ``A A^T X``, whatever becomes of ``X``; batch dimensions broadcast."""
    for name, operator in _operators(A).items():
        mine = torch.empty_strided(X.shape, X.stride(), dtype=X.dtype).copy_(X)
        found = operator.apply_overwriting(mine)
        assert_close(found, operator.to_dense() @ X, f"{name}: apply_overwriting(X)")


def apply_rows(A: StructuredMatrix, X: Tensor) -> None:
    """``A [X; x]`` for rows in two parts, where ``rows_apart``: new tensors, of the same rows."""
    before, memory = X.clone(), X.untyped_storage().data_ptr()
    for name, operator in _operators(A).items():
        if not operator.rows_apart:
            continue
        expected = operator.to_dense() @ X
        for s in range(A.n + 1):
            parts = operator.apply_rows(X[..., :s, :], X[..., s:, :])
            for i, (found, rows) in enumerate(
                zip(parts, expected.split([s, A.n - s], -2), strict=True)
            ):
                what = f"{name}: apply_rows of {s} rows and {A.n - s}, part {i}"
                assert_close(found, rows, what)
                shared = found.numel() and found.untyped_storage().data_ptr() == memory
                assert not shared, f"{what}: the result shares memory with an operand"
            assert torch.equal(X, before), f"{name}: apply_rows: an operand was written to"


def _operators(A: StructuredMatrix) -> dict[str, Operator]:
    return {"A": A, "A A^T": A.outer()}


PRODUCTS = (apply_overwriting, apply_rows)
