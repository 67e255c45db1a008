"""Kronecker products of two structures as a space: all sums of products of their members.

::

    A B        a block structure whose blocks have a structure of their own:
    . C        with A of size n / k and C of size k, a number for each pair of their numbers
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Size, Tensor

from structured._core.matrix import Scalar, StructuredMatrix, largest, static, trailing
from structured._core.spec import StructureLike, parse
from structured._core.stored import zero_of
from structured.tied import part_size

Key = tuple[Any, ...]


def _key(member: StructuredMatrix) -> Key:
    """A structure as constants.

    Raises:
        ValueError: If there are static tensors in it, which are no constants.
    """
    if member.static_tensors():
        raise ValueError(
            f"kron: expected structures without static tensors, got {member!r}; "
            "rotated(kron(A, C, k), Q) has one basis for both"
        )
    return member.key(len(member.batch_shape))


def _flat(member: StructuredMatrix) -> Tensor:
    """The stored numbers in one dimension, ``[..., p]``."""
    batch = len(member.batch_shape)
    tensors = (t if t.ndim > batch else t[..., None] for t in member.tensors())
    return torch.cat([t.flatten(batch) for t in tensors], -1)


class Kron(StructuredMatrix):
    """``sum_i A_i (x) C_i`` for members ``A_i`` and ``C_i`` of any two structures.

    A :class:`Kronecker` product is one term of such a sum; sums, products and inverses of them lie
    in this space. It holds the other compositions with equal blocks: ``tied(k, A)`` is
    ``kron(scaled_identity, A)``, a matrix of circulant blocks ``kron(dense, circulant)``, the
    two-dimensional circulant one ``kron(circulant, circulant)``.

    A product runs through the pairs of rows and columns of the smaller part, ``k^2`` products of
    the other; one of two members through ``k^3``.
    """

    T: Tensor  # [..., p, q], for each number of A and of C
    first: Key = static()  # structure of A
    last: Key = static()  # structure of C
    sizes: tuple[int, int] = static()  # (n / k, k)

    dimensions = ("p q",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_core("T", *(self._like(key).numel() for key in (self.first, self.last)))

    @classmethod
    def zeros(
        cls,
        n: int,
        first: StructureLike,
        last: StructureLike,
        k: int,
        *,
        batch_shape: Sequence[int] = (),
        **opts: Any,
    ) -> Self:
        """The zero matrix of size ``n``: ``first`` of size n / k times ``last`` of size k.

        Raises:
            ValueError: If ``k`` is not a positive integer that divides ``n``, or one of the
                structures has static tensors.
        """
        A = parse(first)(part_size(n, k, "kron"), **opts)
        C = parse(last)(k, **opts)
        T = torch.zeros(*batch_shape, A.numel(), C.numel(), dtype=A.dtype, device=A.device)
        return cls(T, _key(A), _key(C), (A.n, C.n))

    @classmethod
    def product(cls, A: StructuredMatrix, C: StructuredMatrix) -> Self:
        """``A (x) C``, whose batch shapes broadcast.

        Raises:
            ValueError: If one of the structures has static tensors.
        """
        T = _flat(A)[..., :, None] * _flat(C)[..., None, :]
        return cls(T, _key(A), _key(C), (A.n, C.n))

    # Both parts, zero, and with numbers ---------------------------------------------------------

    def _like(self, key: Key) -> Any:
        return zero_of(key, (), device=self.device, dtype=self.dtype)

    def _filled(self, key: Key, flat: Tensor) -> Any:
        """The member with the numbers ``flat [..., p]``."""
        zero = self._like(key)
        cores = [t.shape for t in zero.tensors()]
        parts = flat.split([core.numel() for core in cores], -1)
        tensors = [p.reshape(*flat.shape[:-1], *c) for p, c in zip(parts, cores, strict=True)]
        return zero.with_tensors(tensors)

    @property
    def _of_first(self) -> Any:
        """Members ``[..., k, k]`` of the first structure: one for each place of the last."""
        blocks = self._filled(self.last, self.T).to_dense()  # [..., p, k, k]
        return self._filled(self.first, blocks.movedim(-3, -1))

    @property
    def _of_last(self) -> Any:
        """Members ``[..., n / k, n / k]`` of the last structure."""
        blocks = self._filled(self.first, self.T.mT).to_dense()
        return self._filled(self.last, blocks.movedim(-3, -1))

    def _from_first(self, A: StructuredMatrix) -> Self:
        """Inverse of :attr:`_of_first`."""
        blocks = _flat(A).movedim(-1, -3)
        return self._build([_flat(self._like(self.last).orthogonal_project(blocks))])

    def _from_last(self, C: StructuredMatrix) -> Self:
        """Inverse of :attr:`_of_last`."""
        blocks = _flat(C).movedim(-1, -3)
        return self._build([_flat(self._like(self.first).orthogonal_project(blocks)).mT])

    @property
    def closed_under_transpose(self) -> bool:  # type: ignore[override]  # depends on the parts
        """If both parts are."""
        return all(self._like(key).closed_under_transpose for key in (self.first, self.last))

    def to_dense(self) -> Tensor:
        """``M_{ik + a, jk + b}`` is entry ``(i, j)`` of the member for the place ``(a, b)``."""
        dense = self._of_first.to_dense()  # [..., a, b, i, j]
        return dense.movedim((-4, -3), (-3, -1)).reshape(self.shape)

    @property
    def shape(self) -> Size:
        """``[..., n, n]``."""
        n = math.prod(self.sizes)
        return Size((*self.T.shape[:-2], n, n))

    @property
    def mT(self) -> Kron:
        """The transposed parts."""
        first = self._filled(self.first, self.T.mT).mT  # [..., q]
        last = self._filled(self.last, _flat(first).mT).mT
        return Kron(_flat(last), _key(first), _key(last), self.sizes)

    @property
    def _by_first(self) -> bool:
        """Whether the first structure is the larger part, whose members multiply."""
        size, k = self.sizes
        return k <= size

    def matmul(self, other: Self) -> Self:
        """Products of the members of the larger part, k^3 of them."""
        A, B = (M._of_first if self._by_first else M._of_last for M in (self, other))
        row, column = self.T.ndim - 2, self.T.ndim - 1
        terms = (
            A.map(lambda t, k=k: t.select(column, k).unsqueeze(column)).matmul(
                B.map(lambda t, k=k: t.select(row, k).unsqueeze(row))
            )
            for k in range(min(self.sizes))
        )
        if not self.shape[-1]:
            return self.clone()
        found = functools.reduce(operator.add, terms)
        return self._from_first(found) if self._by_first else self._from_last(found)

    def apply(self, X: Tensor) -> Tensor:
        """Products of the members of the larger part, k^2 of them."""
        return self._product(X, "apply", self.T.ndim - 1)

    def apply_transpose(self, X: Tensor) -> Tensor:
        """Products of the members of the larger part, k^2 of them."""
        return self._product(X, "apply_transpose", self.T.ndim - 2)

    def _product(self, X: Tensor, name: str, dim: int) -> Tensor:
        if not self.shape[-1]:
            return self.to_dense() @ X
        grid = X.unflatten(-2, self.sizes)
        rows = grid.transpose(-3, -2) if self._by_first else grid  # [..., k, others, m]
        members = self._of_first if self._by_first else self._of_last
        terms = (
            getattr(members.map(lambda t, k=k: t.select(dim, k)), name)(rows[..., k, None, :, :])
            for k in range(min(self.sizes))
        )
        Y = functools.reduce(torch.add, terms)
        return (Y.transpose(-3, -2) if self._by_first else Y).flatten(-3, -2)

    def orthogonal_project(self, M: Tensor) -> Self:
        """Onto the first structure for each place of the last, then onto the last."""
        grid = M.unflatten(-1, self.sizes).unflatten(-3, self.sizes)  # [..., i, a, j, b]
        blocks = grid.movedim((-3, -1), (-4, -3))
        return self._from_first(self._like(self.first).orthogonal_project(blocks))

    def project(self, S: Tensor) -> Self:
        """As :meth:`orthogonal_project`, if both parts are closed under transposition."""
        closed = self.closed_under_transpose
        return self.orthogonal_project(S) if closed else super().project(S)

    def gram(self) -> Self:
        """``A^T A``, if both parts are closed under transposition."""
        transposed = self.mT
        if not self.closed_under_transpose or transposed.layout != self.layout:
            return super().gram()
        return self._build([transposed.matmul(self).T])

    def diagonal(self) -> Tensor:
        """The diagonal of one part, then that of the other."""
        last = self._filled(self.last, self.T).diagonal()  # [..., p, k]
        return self._filled(self.first, last.mT).diagonal().mT.flatten(-2)

    def trace(self) -> Tensor:
        """The trace of one part, then that of the other."""
        traces: Tensor = self._filled(self.first, self._filled(self.last, self.T).trace()).trace()
        return traces

    def add_scaled_identity(self, alpha: Scalar) -> Self:
        """``alpha`` times the numbers of both identities."""
        p, q = (_flat(self._like(k).add_scaled_identity(1.0)) for k in (self.first, self.last))
        alpha = trailing(alpha, self.T) if isinstance(alpha, Tensor) else alpha
        return self._build([(self.T + alpha * (p[:, None] * q)).to(self.dtype)])

    def exp(self) -> Self:
        """By products."""
        return self._exp_by_products()

    def max_abs(self) -> Tensor:
        """Largest absolute entry."""
        return largest(self._of_first.max_abs(), self.T.ndim - 2)

    def frobenius_norm(self) -> Tensor:
        """Square root of the sum of all squared entries."""
        return torch.linalg.vector_norm(self._of_first.frobenius_norm(), dim=(-2, -1))

    def _describe(self) -> str:
        parts = (repr(self._like(key)).partition(" [")[0] for key in (self.first, self.last))
        return f"Kron({self.n}; {' (x) '.join(parts)})"
