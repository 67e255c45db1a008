"""The laws of solves and determinants.

Written as in ``laws.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from structured._core.matrix import StructuredMatrix
from structured._core.spec import Structure
from structured.testing.laws import assert_close

_SINGULAR = 1e13  # condition numbers where float64 no longer tells


def solve(K: StructuredMatrix, X: Tensor) -> None:
    """``K^-1 X``."""
    assert_close(K.solve(X), torch.linalg.inv(K.to_dense()) @ X, "solve(X)")


def solve_transpose(K: StructuredMatrix, X: Tensor) -> None:
    """``K^-T X``."""
    assert_close(K.solve_transpose(X), torch.linalg.inv(K.to_dense()).mT @ X, "solve_transpose(X)")


def singular(A: StructuredMatrix, X: Tensor) -> None:
    """To invert a singular member is an error, not infinities; with one in a batch as well."""
    zero = A.map(torch.zeros_like)
    members = {"zero": zero}
    ways: list[Callable[[Any], Any]] = [lambda A: A.solve(X), lambda A: A.solve_transpose(X)]
    ways.append(lambda A: A.inverse())
    if A.batch_shape:
        first = torch.arange(A.batch_shape[0]) == 0
        shift = (~first).to(A.dtype)[(...,) + (None,) * (len(A.batch_shape) - 1)]
        members["zero and the identity"] = zero.add_scaled_identity(shift.expand(A.batch_shape))
    for name, member in members.items():
        if not member.to_dense().numel():
            return
        for way in ways if X.numel() else ():
            try:
                found = way(member)
            except RuntimeError:  # torch.linalg.LinAlgError
                continue
            raise AssertionError(f"inverse of {name}: expected a LinAlgError, got {found}")


def stable_solve(structure: Structure, sizes: Sequence[int]) -> None:
    """``x = A^{-1} b`` is backward stable: ``|A x - b| <= 16 n u (|A| |x| + |b|)``, norm by norm.

    However ill-conditioned ``A`` is (Higham 2002, section 7.1), but for numerically singular ones:
    seeded members of one size, whose diagonal is 1 to 1/128 on average.
    """
    n, count = max(sizes), 64
    generator = torch.Generator().manual_seed(0)
    zero = structure(n, batch_shape=(count,), dtype=torch.float64)
    A = zero.map(lambda t: torch.randn(t.shape, dtype=t.dtype, generator=generator))
    A = A.add_scaled_identity(0.5 ** (torch.arange(count) % 8) - A.trace() / max(n, 1))
    dense, u = A.to_dense(), torch.finfo(A.dtype).eps / 2
    b = dense @ torch.randn(count, n, 2, dtype=A.dtype, generator=generator)
    x, norm = A.solve(b), torch.linalg.matrix_norm
    error, scale = norm(dense @ x - b), norm(dense) * norm(x) + norm(b)
    regular = torch.linalg.cond(dense) < _SINGULAR if n else torch.ones(count, dtype=torch.bool)
    worst = torch.where(regular & (scale != 0), error / scale, 0).max()
    assert worst <= 16 * n * u, f"|A x - b| is {worst:.1g} of |A| |x| + |b|, bound {16 * n * u:.1g}"


def logdet(K: StructuredMatrix) -> None:
    """``log |det K|``, and of ``-K``, whose determinant may be negative."""
    expected = torch.linalg.slogdet(K.to_dense()).logabsdet
    assert_close(K.logdet(), expected, "logdet")
    assert_close((-K).logdet(), expected, "logdet of -K")


SOLVES = (solve, solve_transpose, singular, stable_solve, logdet)
