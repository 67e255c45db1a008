"""Kronecker products of operators: no structure, for their sums are no Kronecker products.

::

    A (x) C        the numbers of A and of C; products those of A and of C with more columns
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Size, Tensor

from structured._core.checks import check_scalar
from structured._core.lazy import Lazy, expand
from structured._core.matrix import Operator, Scalar, StructuredMatrix, at_least_float32, trailing
from structured._products.kronecker import kron, kron_vectors, one_by_one
from structured.dense import Dense
from structured.diagonal import Diagonal
from structured.rotated import Rotated


class Kronecker(Lazy):
    """``A_1 (x) ... (x) A_k``, of any operators, whose batch shapes broadcast.

    With two factors, its product with ``vec(G)``, the rows of ``G`` in turn, is ``C G K^T``. Most
    operations are those of the factors, one by one, and nothing of size n x n is written.

    >>> from structured import Diagonal, parse
    >>> P = Kronecker(parse("dense").identity(3), Diagonal(torch.tensor([1.0, 2.0])))
    >>> P.n, P.trace().item(), P.inverse().to_dense().diagonal().tolist()
    (6, 9.0, [1.0, 0.5, 1.0, 0.5, 1.0, 0.5])

    Args:
        factors: At least one operator; all of one dtype, on one device.

    Raises:
        TypeError: If a factor is no operator.
        ValueError: If there is none, or their dtypes, devices or batch shapes do not fit.
    """

    @property
    def factors(self) -> tuple[Operator, ...]:
        """``A_i [..., n_i, n_i]``."""
        return self.parts

    @property
    def shape(self) -> Size:
        """``[..., n, n]``, ``n`` the product of the sizes of the factors."""
        n = math.prod(self._sizes)
        return Size((*self._joint_batch_shape(), n, n))

    @property
    def _sizes(self) -> list[int]:
        return [A.n for A in self.factors]

    @property
    def mT(self) -> Kronecker:
        """``A_1^T (x) ... (x) A_k^T``."""
        return Kronecker(*(A.mT for A in self.factors))

    def to_dense(self) -> Tensor:
        """Write the product out."""
        return kron(A.to_dense() for A in self.factors)

    # Products and solves: one factor after another ----------------------------------------------

    def apply(self, X: Tensor) -> Tensor:
        """``P X`` for ``X [..., n, m]``: by each ``A_i`` with ``m n / n_i`` columns."""
        return one_by_one(X, self._sizes, [A.apply for A in self.factors])

    def apply_transpose(self, X: Tensor) -> Tensor:
        """``P^T X`` for ``X [..., n, m]``."""
        return one_by_one(X, self._sizes, [A.apply_transpose for A in self.factors])

    def apply_matrix(self, G: Tensor) -> Tensor:
        """``C G K^T`` for ``G [..., p, q]``, of two factors ``C (x) K``."""
        C, K = self._pair()
        return C.apply_overwriting(K.apply(G.mT).mT)

    def _pair(self) -> tuple[Operator, Operator]:
        if len(self.factors) != 2:
            raise ValueError(f"Kronecker: expected two factors, got {len(self.factors)}")
        return self.factors[0], self.factors[1]

    def solve(self, X: Tensor) -> Tensor:
        """``P^{-1} X`` for ``X [..., n, m]`` or ``[n]``, by the solves of the factors."""
        return one_by_one(X, self._sizes, [A.solve for A in self.factors])

    def inverse(self) -> Kronecker:
        """``A_1^{-1} (x) ... (x) A_k^{-1}``, each a member of the structure of its factor."""
        return Kronecker(*(A.inverse() for A in self._members()))

    def outer(self) -> Kronecker:
        """``A_1 A_1^T (x) ... (x) A_k A_k^T``."""
        return Kronecker(*(A.outer() for A in self._members()))

    def matmul(self, other: Kronecker) -> Kronecker:
        """``A_1 B_1 (x) ... (x) A_k B_k``; factors of unlike structures give a dense one.

        Raises:
            ValueError: If the factors are not of the same sizes.
        """
        ours, theirs = self._sizes, other._sizes
        if ours != theirs:
            raise ValueError(f"Kronecker @: expected factors of sizes {ours}, got {theirs}")
        pairs = zip(self.factors, other.factors, strict=True)
        return Kronecker(*(_product(A, B) for A, B in pairs))

    def __matmul__(self, other: Any) -> Any:
        """``P @ Q`` for a Kronecker product of as many factors, ``P @ X`` for a tensor."""
        return self.matmul(other) if isinstance(other, Kronecker) else super().__matmul__(other)

    # Numbers ------------------------------------------------------------------------------------

    def trace(self) -> Tensor:
        """Product of the traces, ``[...]``."""
        return _product_of(A.trace() for A in self.factors)

    def logdet(self) -> Tensor:
        """``sum_i (n / n_i) log|det A_i|``, ``[...]``."""
        sizes = self._sizes
        others = (math.prod(sizes[:i] + sizes[i + 1 :]) for i in range(len(sizes)))
        terms = (k * A.logdet() for k, A in zip(others, self.factors, strict=True))
        return functools.reduce(torch.add, terms)

    def frobenius_norm(self) -> Tensor:
        """Product of the norms, ``[...]``."""
        return _product_of(A.frobenius_norm() for A in self.factors)

    def spectral_norm(self) -> Tensor:
        """Product of the norms, ``[...]``."""
        return _product_of(A.spectral_norm() for A in self.factors)

    def max_abs(self) -> Tensor:
        """Largest absolute entry, ``[...]``: the product of those of the factors."""
        return _product_of(A.max_abs() for A in self.factors)

    def diagonal(self) -> Tensor:
        """``[..., n]``, the Kronecker product of the diagonals."""
        return kron_vectors(A.diagonal() for A in self.factors)

    def squared_rows(self) -> Tensor:
        """``[..., n]``, the Kronecker product of those of the factors."""
        return kron_vectors(A.squared_rows() for A in self.factors)

    # Scaling and shifting -----------------------------------------------------------------------

    def _scaled(self, scale: Callable[[Any], Any]) -> Kronecker:
        """The first factor is scaled."""
        first, *rest = self._members()
        return Kronecker(scale(first), *rest)

    def add_scaled_identity(self, alpha: Scalar) -> Rotated:
        """``P + alpha I`` for symmetric factors, by their eigenvalues: a rotated diagonal matrix.

        ``Q diag(lambda_1i lambda_2j ... + alpha) Q^T``, ``Q`` the Kronecker product of the
        eigenvectors, found in float32 at least. Its products and solves cost two products with
        ``Q``. Only the lower triangles of the factors are read; gradients need eigenvalues that
        differ, as those of :func:`torch.linalg.eigh`.

        Args:
            alpha: A number or a tensor of the batch shape.
        """
        check_scalar(self, alpha, "add_scaled_identity")
        wide = at_least_float32(self.dtype)
        pairs = [torch.linalg.eigh(A.to_dense().to(wide)) for A in self.factors]
        values = kron_vectors(pair.eigenvalues for pair in pairs)
        shift = trailing(alpha, values) if isinstance(alpha, Tensor) else alpha
        Q = Kronecker(*(Dense(pair.eigenvectors) for pair in pairs))
        return Rotated(Diagonal((values + shift).to(wide)), Q).to(self.dtype)

    def expand(self, *batch_shape: int) -> Kronecker:
        """The same product with every factor of the given batch shape."""
        return Kronecker(*(expand(A, batch_shape) for A in self._members()))

    def _members(self) -> list[Any]:
        """The factors with all operations: what knows its products alone is written out."""
        known = (StructuredMatrix, Kronecker)
        return [A if isinstance(A, known) else Dense(A.to_dense()) for A in self.factors]

    def __repr__(self) -> str:
        return " (x) ".join(map(repr, self.factors))


def _product_of(numbers: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.mul, numbers)


def _product(A: Operator, B: Operator) -> Operator:
    """``A B``, a member where both are of one structure."""
    if isinstance(A, Kronecker) and isinstance(B, Kronecker):
        return A.matmul(B)
    if isinstance(A, StructuredMatrix) and A.layout == getattr(B, "layout", None):
        return A @ B
    return Dense(A.apply(B.to_dense()))
