"""Incidence algebras: entries where one element of an ordered set is below another.

::

    a b . d        the order of the divisors: i | j, for i and j from 1 on
    . c . e
    . . f .        a number for each pair i <= j of the order; products run over the chains
    . . . g        i <= k <= j
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Size, Tensor

from structured._core.matrix import Scalar, StructuredMatrix, at_least_float32, largest, static
from structured._core.spec import words

_SPARSE = 32  # a relation with more than n^2 / 32 pairs is multiplied as a dense matrix


def _divisors(i: Tensor, j: Tensor) -> Tensor:
    return (j + 1) % (i + 1) == 0


def _subsets(i: Tensor, j: Tensor) -> Tensor:
    return i & j == i


def _ancestors(i: Tensor, j: Tensor) -> Tensor:
    """In a binary tree whose node k has the children 2k + 1 and 2k + 2."""
    below = i == j
    while bool((j > 0).any()):
        j = (j - 1).div(2, rounding_mode="floor").clamp(min=-1)
        below = below | (i == j)
    return below


_ORDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "divisors": _divisors,
    "subsets": _subsets,
    "ancestors": _ancestors,
}
words(*_ORDERS)


def _relation(n: int, order: str | Tensor) -> Tensor:
    """Which pairs ``(i, j)`` have ``i <= j``, boolean, ``[n, n]``, on the CPU.

    Raises:
        ValueError: If the name is unknown, or the relation not reflexive and transitive.
    """
    if isinstance(order, str):
        if order not in _ORDERS:
            raise ValueError(f"incidence: expected one of {list(_ORDERS)}, got {order!r}")
        ramp = torch.arange(n, device="cpu")
        return _ORDERS[order](ramp[:, None], ramp)
    if not isinstance(order, Tensor) or order.dtype != torch.bool or order.shape != (n, n):
        got = f"{order.dtype} {list(order.shape)}" if isinstance(order, Tensor) else repr(order)
        raise ValueError(f"incidence: expected a boolean tensor [{n}, {n}], got {got}")
    order = order.cpu()
    steps = order.float()
    if not order.diagonal().all() or ((steps @ steps > 0) & ~order).any():
        raise ValueError("incidence: expected a reflexive and transitive relation, got another one")
    return order


def _chains(places: Tensor, n: int) -> Tensor:
    """Pairs ``i <= k``, ``k <= j`` and ``i <= j`` by their numbers, ``[3, chains]``."""
    rows, columns = places // max(n, 1), places % max(n, 1)
    lengths = torch.bincount(rows, minlength=n)
    starts = lengths.cumsum(0) - lengths
    counts = lengths[columns]  # each pair (i, k) goes on with all of row k
    ramp = functools.partial(torch.arange, device=places.device)
    first = ramp(len(places)).repeat_interleave(counts)
    offset = ramp(len(first)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    second = starts[columns[first]] + offset
    ends = rows[first] * n + columns[second]
    return torch.stack([first, second, torch.searchsorted(places, ends)])


class Incidence(StructuredMatrix):
    """``A_ij = 0`` unless ``i <= j`` in a partial order of the rows.

    Stores a number for each pair of the order. Where these are less than n^2 / 32, products run
    over them alone, products of two members over the chains ``i <= k <= j``; else as of dense
    matrices. The inverse of the matrix of ones is that of the Möbius function.

    Source: Rota, "On the foundations of combinatorial theory I" (Z. Wahrsch. 2, 1964).

    Args:
        v: The numbers, row by row.
        places: Where they are among all n^2 places, ascending.
        chains: Which numbers multiply to which, ``[3, chains]``, in a sparse order.
        size: ``n``.
    """

    v: Tensor  # [..., p]
    places: Tensor = static()  # [p], i n + j
    chains: Tensor = static()  # [3, chains]
    size: int = static()  # n

    dimensions = ("p",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_core("v", len(self.places))

    @classmethod
    def zeros(
        cls, n: int, order: str | Tensor, *, batch_shape: Sequence[int] = (), **opts: Any
    ) -> Self:
        """The zero matrix of size ``n``.

        Args:
            n: The size.
            order: ``"divisors"`` (i + 1 divides j + 1), ``"subsets"`` (the binary digits of i are
                among those of j), ``"ancestors"`` (in a binary tree whose node k has the children
                2k + 1 and 2k + 2), or which pairs ``(i, j)`` have ``i <= j``, boolean ``[n, n]``.
            batch_shape: Leading dimensions.
            opts: ``dtype`` and ``device``, as of :func:`torch.zeros`.

        Raises:
            ValueError: If the name is unknown, or the relation not reflexive and transitive.
        """
        relation = _relation(n, order)
        places = relation.flatten().nonzero()[:, 0]
        sparse = len(places) * _SPARSE <= n * n
        chains = _chains(places, n) if sparse else places.new_zeros(3, 0)
        v = torch.zeros(*batch_shape, len(places), **opts)
        return cls(v, places.to(v.device), chains.to(v.device), n)

    def to_dense(self) -> Tensor:
        """Every number in its place."""
        n, batch = self.size, self.v.shape[:-1]
        flat = self.v.new_zeros(*batch, n * n).index_copy(-1, self.places, self.v)
        return flat.reshape(*batch, n, n)

    @property
    def shape(self) -> Size:
        """``[..., n, n]``."""
        return Size((*self.v.shape[:-1], self.size, self.size))

    @property
    def _is_sparse(self) -> bool:
        return self.chains.shape[-1] > 0

    @property
    def _pairs(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of the numbers, ``[p]``."""
        n = max(self.size, 1)
        return self.places.div(n, rounding_mode="floor"), self.places % n

    def _sums(self, terms: Tensor, where: Tensor, count: int, dim: int) -> Tensor:
        """Terms added up along a dimension, in float32 at least, into ``count`` places."""
        wide = terms.to(at_least_float32(terms.dtype))
        shape = list(wide.shape)
        shape[dim] = count
        return wide.new_zeros(shape).index_add(dim, where, wide).to(terms.dtype)

    def matmul(self, other: Self) -> Self:
        """Sums over the chains ``i <= k <= j``."""
        if not self._is_sparse:
            return super().matmul(other)
        first, second, ends = self.chains
        return self._build([self._over_chains(self.v, first, other.v, second, ends)])

    def _over_chains(
        self, v: Tensor, left: Tensor, w: Tensor, right: Tensor, where: Tensor
    ) -> Tensor:
        """Sums of the products of ``v`` and ``w`` at two pairs of each chain, at the third."""
        wide = at_least_float32(self.dtype)
        terms = v.to(wide)[..., left] * w.to(wide)[..., right]
        return self._sums(terms, where, self.v.shape[-1], -1).to(self.dtype)

    def gram(self) -> Self:
        """Sums over the chains ``k <= i <= j`` for the pair ``i <= j``."""
        if not self._is_sparse:
            return super().gram()
        first, second, ends = self.chains
        return self._build([self._doubled(self._over_chains(self.v, first, self.v, ends, second))])

    def _outer(self) -> Self:
        """Sums over the chains ``i <= j <= k``."""
        if not self._is_sparse:
            return super()._outer()
        first, second, ends = self.chains
        return self._build([self._doubled(self._over_chains(self.v, ends, self.v, second, first))])

    def _product(self, X: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        wide = at_least_float32(X.dtype)
        terms = self.v.to(wide)[..., None] * X.to(wide).index_select(-2, columns)
        return self._sums(terms, rows, self.size, -2).to(X.dtype)

    def apply(self, X: Tensor) -> Tensor:
        """Number by number, or as a dense matrix."""
        return self._product(X, *self._pairs) if self._is_sparse else super().apply(X)

    def apply_transpose(self, X: Tensor) -> Tensor:
        """Number by number, or as a dense matrix."""
        rows, columns = self._pairs
        return self._product(X, columns, rows) if self._is_sparse else super().apply_transpose(X)

    def orthogonal_project(self, M: Tensor) -> Self:
        """The entries of ``M [..., n, n]`` at the pairs of the order."""
        return self._build([M.flatten(-2).index_select(-1, self.places)])

    def _doubled(self, v: Tensor) -> Tensor:
        """``Pi`` from the entries of a symmetric matrix: twice what has no mirror image."""
        if not len(self.places):
            return v
        rows, columns = self._pairs
        mirrors = columns * self.size + rows
        found = torch.searchsorted(self.places, mirrors).clamp(max=len(self.places) - 1)
        return torch.where(self.places[found] == mirrors, v, 2 * v)

    def project(self, S: Tensor) -> Self:
        """The entries of ``S [..., n, n]``, twice where ``j <= i`` is no pair."""
        return self._build([self._doubled(self.orthogonal_project(S).v)])

    def project_gram(self, X: Tensor) -> Self:
        """Products of two rows of ``X [..., n, m]`` for each pair, in a sparse order."""
        return self._build([self._doubled(self.orthogonal_project_gram(X).v)])

    def orthogonal_project_gram(self, X: Tensor) -> Self:
        """The same products, once."""
        if not self._is_sparse:
            return super().orthogonal_project_gram(X)
        rows, columns = (X.index_select(-2, which) for which in self._pairs)
        return self._build([torch.linalg.vecdot(rows, columns)])

    def diagonal(self) -> Tensor:
        """The numbers of the pairs ``i <= i``."""
        ramp = torch.arange(self.size, device=self.device) * (self.size + 1)
        return self.v.index_select(-1, torch.searchsorted(self.places, ramp))

    def squared_rows(self) -> Tensor:
        """Number by number."""
        return self._sums(self.v.square(), self._pairs[0], self.size, -1)

    def _squared_columns(self) -> Tensor:
        """Number by number."""
        return self._sums(self.v.square(), self._pairs[1], self.size, -1)

    def add_scaled_identity(self, alpha: Scalar) -> Self:
        """Add to the numbers of the pairs ``i <= i``."""
        rows, columns = self._pairs
        each = alpha[..., None] if isinstance(alpha, Tensor) and alpha.ndim else alpha
        return self._build([(self.v + each * (rows == columns).to(self.dtype)).to(self.dtype)])

    def exp(self) -> Self:
        """By products over the chains in a sparse order, else as of a dense matrix."""
        return self._exp_by_products() if self._is_sparse else super().exp()

    def max_abs(self) -> Tensor:
        """Largest absolute entry."""
        return largest(self.v, self.v.ndim - 1)

    def frobenius_norm(self) -> Tensor:
        """Norm of the numbers."""
        return torch.linalg.vector_norm(self.v, dim=-1)
