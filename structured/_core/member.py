"""What can be added, scaled and multiplied: records of tensors that are operators."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Self, TypeAlias

import torch
from torch import Generator, Tensor

from structured._core.checks import check_member, check_scalar
from structured._core.entries import places
from structured._core.lazy import Product
from structured._core.numbers import trailing
from structured._core.operator import Operator
from structured._core.stored import Stored
from structured._products.in_place import plain

Scalar: TypeAlias = "float | Tensor"


class Scaled(Stored, Operator):
    """Records of tensors that are operators, linear in them: how they are scaled and printed."""

    def __neg__(self) -> Self:
        """``-A``."""
        return self._map(torch.neg)

    def __mul__(self, c: Scalar) -> Self:
        """``c A`` for a number or a tensor of the batch shape; keeps the dtype of ``A``."""
        if not isinstance(c, Tensor):
            return self._map(lambda t: t * c) if isinstance(c, Real) else NotImplemented
        check_scalar(self, c, "*")
        return self._map(lambda t: (t * trailing(c, t)).to(t.dtype))

    __rmul__ = __mul__

    def __truediv__(self, c: Scalar) -> Self:
        """``A / c`` for a number or a tensor of the batch shape; keeps the dtype of ``A``."""
        if not isinstance(c, Tensor):
            return self._map(lambda t: t / c) if isinstance(c, Real) else NotImplemented
        check_scalar(self, c, "/")
        return self._map(lambda t: (t / trailing(c, t)).to(t.dtype))

    def __repr__(self) -> str:
        batch = f", batch {tuple(self.batch_shape)}" if self.batch_shape else ""
        return f"{self._describe()} [{str(self.dtype).removeprefix('torch.')}{batch}]"

    def _describe(self) -> str:
        """``name(n; field = shape or part, ...)``."""
        parts = []
        for name in self._fields + self._static:
            part = getattr(self, name)
            if isinstance(part, Scaled):
                parts.append(f"{name} = {part._describe()}")
            elif isinstance(part, Tensor):
                core = part.shape[len(self.batch_shape) :]
                parts.append(f"{name}: {' x '.join(map(str, core)) or '1'}")
            else:
                parts.append(f"{name} = {part}")
        return f"{type(self).__name__}({self.n}; {', '.join(parts)})"


class Member(Scaled):
    """An element of an algebra of operators: sums, products and members of a batch."""

    @classmethod
    @abstractmethod
    def zeros(cls, n: int, *options: Any, **kwargs: Any) -> Self:
        """The zero member of size ``n``; options such as a block size appear here and only here.

        Args:
            n: The size.
            options: Whatever else makes the structure.
            kwargs: ``batch_shape=()``, and ``dtype`` and ``device`` as of :func:`torch.zeros`.
        """

    @classmethod
    def identity(cls, n: int, *options: Any, **kwargs: Any) -> Self:
        """The identity of size ``n``; arguments as for :meth:`zeros`."""
        return cls.zeros(n, *options, **kwargs).add_scaled_identity(1.0)

    def expand(self, *batch_shape: int) -> Self:
        """The same numbers again and again along further batch dimensions, without a copy.

        Raises:
            ValueError: If our batch shape does not broadcast to that.
        """
        first, ours = len(self.batch_shape), self.batch_shape
        if not _broadcasts(ours, batch_shape):
            raise ValueError(
                f"{type(self).__name__}.expand: expected a batch shape that {list(ours)} "
                f"broadcasts to, got {list(batch_shape)}"
            )
        return self._map(lambda t: t.expand((*batch_shape, *t.shape[first:])))

    def sum(self, dim: int | Sequence[int] | None = None) -> Self:
        """The sum over some of the batch dimensions, over all by default.

        Args:
            dim: Dimension of :attr:`batch_shape`; negative ones count from its end.

        Raises:
            IndexError: If there is no such batch dimension.
        """
        count = len(self.batch_shape)
        given = range(count) if dim is None else (dim,) if isinstance(dim, int) else dim
        for each in given:
            if not -count <= each < count:
                raise IndexError(
                    f"{type(self).__name__}.sum: expected one of {count} batch dimensions, "
                    f"got {each}"
                )
        dims = tuple(each % count for each in given)
        return self._summed(dims) if dims else self.clone()

    def _summed(self, dims: tuple[int, ...]) -> Self:
        """The sum over these batch dimensions; part by part, for a basis may be one's own."""
        parts = [getattr(self, name) for name in self._fields]
        return self._build(
            [p._summed(dims) if isinstance(p, Member) else p.sum(dims) for p in parts]
        )

    def _picked(self, pick: Callable[[Tensor], Tensor]) -> Self:
        """The members of the batch that ``pick`` takes of each tensor; part by part, as sums."""
        parts = [getattr(self, name) for name in self._fields]
        return self._build([p._picked(pick) if isinstance(p, Member) else pick(p) for p in parts])

    def __getitem__(self, index: Any) -> Any:
        """``A[k]``, members of the batch, views as of tensors; ``A[..., i, j]``, entries.

        The same as of ``A.to_dense()``, but that a matrix which is left whole stays a member.

        Raises:
            IndexError: If an index is out of range, or there are too many.
        """
        where = places(index, len(self.shape))
        if where is not None and where[-2:] == [slice(None)] * 2:
            return self._picked(lambda t: t[tuple(where[:-2])])
        if isinstance(index, Tensor):
            taken = index.ndim if index.dtype == torch.bool else 1
            if taken <= len(self.batch_shape):
                return self._picked(lambda t: t[index])
        return super().__getitem__(index)

    @abstractmethod
    def matmul(self, other: Self) -> Self:
        """The product ``A B`` of two members of one structure."""

    @classmethod
    def from_dense(cls, M: Tensor, *options: Any) -> Self:
        """The member nearest to ``M [..., n, n]``: ``M`` itself, where it is a member.

        Args:
            M: Any matrix; its dtype and device are those of the member.
            options: Options, as for :meth:`zeros`.
        """
        zero = cls.zeros(M.shape[-1], *options, dtype=M.dtype, device=M.device)
        return zero.orthogonal_project(M)

    @classmethod
    def randn(
        cls, n: int, *options: Any, generator: Generator | None = None, **kwargs: Any
    ) -> Self:
        """A member whose stored numbers are independent, standard normal.

        Args:
            n: The size.
            options: Options, as for :meth:`zeros`.
            generator: Generator of the numbers.
            kwargs: Keywords, as for :meth:`zeros`.
        """
        return cls.zeros(n, *options, **kwargs).randn_like(generator=generator)

    def randn_like(self, *, generator: Generator | None = None) -> Self:
        """A member like this whose stored numbers are independent, standard normal."""
        return self._map(lambda t: torch.empty_like(t).normal_(generator=generator))

    @abstractmethod
    def orthogonal_project(self, M: Tensor) -> Self:
        """``P(M)``, the member nearest to any ``M [..., n, n]`` in the Frobenius norm."""

    @abstractmethod
    def outer(self) -> Operator:
        """``A A^T``, symmetric."""

    @abstractmethod
    def add_scaled_identity(self, alpha: Scalar) -> Self:
        """``A + alpha I`` for a number or a tensor ``alpha`` of the batch shape."""

    def __matmul__(self, other: Any) -> Any:
        """``A @ B`` for a member of the same structure, ``A @ X`` for a tensor.

        For a member of the transposed structure an operator: that of :meth:`outer` if it is
        ``A^T`` itself, else a :class:`Product`.
        """
        if not isinstance(other, Member):
            return super().__matmul__(other)
        if (type(self) is type(other) and self.layout == other.layout) or _alike(self, other):
            return self.matmul(other)
        for A, B in ((self.mT, other), (self, other.mT)):
            if isinstance(A, Member) and isinstance(B, Member) and _alike(A, B):
                same = all(map(_is_same, A.tensors(), B.tensors()))
                return self.outer() if same else Product(self, other)
        return self.matmul(other)  # which says what is wrong

    def __add__(self, other: Self) -> Self:
        """``A + B``, members of one structure."""
        if not isinstance(other, Member):
            return NotImplemented
        self, other = check_member(self, other, "+")
        return self._map(torch.add, other)

    def __sub__(self, other: Self) -> Self:
        """``A - B``, members of one structure."""
        if not isinstance(other, Member):
            return NotImplemented
        self, other = check_member(self, other, "-")
        return self._map(torch.sub, other)


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a tensor of one shape expands to another, where -1 stands for a size as it is."""
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(ours in (1, size) or size == -1 for ours, size in pairs)


def _alike(A: Member, B: Member) -> bool:
    """Whether both are of one structure and size."""
    if type(A) is not type(B):
        return False
    first, second = (M.layout_without(len(M.batch_shape)) for M in (A, B))
    return first == second


def _is_same(t: Tensor, s: Tensor) -> bool:
    """Whether two tensors are the same numbers in memory, where that can be told."""
    if t is s or t.is_meta or not plain():
        return t is s
    return (t.data_ptr(), t.shape, t.stride()) == (s.data_ptr(), s.shape, s.stride())
