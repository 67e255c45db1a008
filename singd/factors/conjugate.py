"""Conjugate gradients, where sums or parts of Kronecker products have no inverse in closed form."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TOLERANCE = 1e-9
"""Norm of the residual relative to that of the right-hand side, both by the preconditioner."""


def solve(
    product: Callable[[Tensor], Tensor], b: Tensor, diagonal: Tensor, *, limit: int = 10_000
) -> Tensor:
    """``x`` with ``A x = b`` for a symmetric positive semi-definite ``A`` and ``b`` in its range.

    Args:
        product: ``A`` of a tensor like ``b``.
        b: Right-hand side, of any shape.
        diagonal: Positive numbers like ``b``, near to the diagonal of ``A``: the preconditioner.
        limit: Largest number of products.

    Raises:
        RuntimeError: If it does not converge.
    """
    x, r = torch.zeros_like(b), b
    z = r / diagonal
    p, rz = z, (r * z).sum()
    start = rz
    for _ in range(limit):
        if bool(rz <= TOLERANCE**2 * start):
            return x
        if not bool(rz.isfinite()):
            break
        Ap = product(p)
        step = rz / (p * Ap).sum()
        x, r = x + step * p, r - step * Ap
        z = r / diagonal
        new = (r * z).sum()
        p, rz = z + (new / rz) * p, new
    left = float((rz / start).sqrt())
    raise RuntimeError(
        f"conjugate gradients: expected {TOLERANCE:g} in {limit} steps, got {left:g}"
    )
