"""Centrosymmetric matrices: the same when rows and columns are both reversed.

::

    a b c d
    e f g h        n^2 / 2 numbers, products half of a dense product
    h g f e
    d c b a
"""

from __future__ import annotations

from typing import Any

from structured._core.spec import Structure, composition
from structured.dense import Dense
from structured.direct_sum import DirectSum
from structured.rotated import Rotated


@composition
def centrosymmetric() -> Structure:
    """``A_ij = A_{n-1-i, n-1-j}``: what commutes with the reversal of the rows.

    Two dense blocks in the basis of symmetric and antisymmetric vectors. A product with X costs
    n^2 / 2 a column, one of two members n^3 / 4. Symmetric Toeplitz matrices, and the curvature of
    whatever does not know left from right, are centrosymmetric.

    Source: Cantoni and Butler, Linear Algebra and its Applications 13 (1976).
    """
    return Structure(_zeros, label="centrosymmetric")


def _zeros(n: int, **opts: Any) -> Rotated:
    even = n - n // 2
    return Rotated(DirectSum(Dense.zeros(even, **opts), Dense.zeros(n - even, **opts)), "mirror")
