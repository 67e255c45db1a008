"""What can be added, scaled and multiplied: records of tensors that are operators."""

from __future__ import annotations

from abc import abstractmethod
from numbers import Real
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor

from structured._core.checks import check_member, check_scalar
from structured._core.numbers import trailing
from structured._core.operator import Operator
from structured._core.stored import Stored

Scalar: TypeAlias = "float | Tensor"


class Member(Stored, Operator):
    """An element of an algebra of operators: sums, multiples, products, and how it is printed."""

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
        """The same numbers again and again along further batch dimensions, without a copy."""
        first = len(self.batch_shape)
        return self._map(lambda t: t.expand(*batch_shape, *t.shape[first:]))

    @abstractmethod
    def matmul(self, other: Self) -> Self:
        """The product ``A B`` of two members of one structure."""

    @abstractmethod
    def add_scaled_identity(self, alpha: Scalar) -> Self:
        """``A + alpha I`` for a number or a tensor ``alpha`` of the batch shape."""

    def __matmul__(self, other: Any) -> Any:
        """``A @ B`` for a member of the same structure, ``A @ X`` for a tensor."""
        return self.matmul(other) if isinstance(other, Member) else super().__matmul__(other)

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
            if isinstance(part, Member):
                parts.append(f"{name} = {part._describe()}")
            elif isinstance(part, Tensor):
                core = part.shape[len(self.batch_shape) :]
                parts.append(f"{name}: {' x '.join(map(str, core)) or '1'}")
            else:
                parts.append(f"{name} = {part}")
        return f"{type(self).__name__}({self.n}; {', '.join(parts)})"
