"""The laws of what an algebra of matrices holds beyond sums and products of its members.

Written as in ``laws.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structured._core.matrix import StructuredMatrix
from structured.testing.laws import assert_close


def inverse(K: StructuredMatrix) -> None:
    """``K^{-1}`` is a member."""
    found = K.inverse()
    assert found.layout == K.layout, f"inverse: {found!r}, expected one like {K!r}"
    assert_close(found, torch.linalg.inv(K.to_dense()), "inverse")


def division(K: StructuredMatrix, B: StructuredMatrix, x: Tensor) -> None:
    """``K.solve`` of a member is ``K^{-1} B``, a member, and of a vector ``K^{-1} x``."""
    expected = torch.linalg.inv(K.to_dense())
    found = K.solve(B)  # type: ignore[arg-type]  # declared for tensors, as structures write it
    assert isinstance(found, StructuredMatrix), f"solve(B): expected a member, got {found!r}"
    assert found.layout == K.layout, f"solve(B): {found!r}, expected one like {K!r}"
    assert_close(found, expected @ B.to_dense(), "solve(B)")
    assert_close(K.solve(x), expected @ x, "solve(x)")


def powers(A: StructuredMatrix, K: StructuredMatrix) -> None:
    """``A^k`` is the product of ``k`` times ``A``, or of its inverse."""
    dense = A.to_dense()
    expected = torch.eye(A.n, dtype=A.dtype).expand(A.shape)
    for k in range(5):
        found = A**k
        assert found.layout == A.layout, f"A ** {k}: {found!r}, expected one like {A!r}"
        assert_close(found, expected, f"A ** {k}")
        expected = expected @ dense
    inverse = torch.linalg.inv(K.to_dense())
    assert_close(K**-2, inverse @ inverse, "K ** -2")


INVERSES = (inverse, division, powers)
