"""Sums and products of operators, as operators: nothing is computed until they are applied."""

from __future__ import annotations

import functools
import operator
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Size, Tensor

from structured._core.checks import check_arguments, check_scalar
from structured._core.composite import Composite
from structured._core.operator import Operator
from structured._core.stored import Stored
from structured._core.wide import round_once

_CHECKED = ("apply", "apply_transpose", "solve")


class Combined(Operator):
    """An operator that adds and multiplies to further ones."""

    def __add__(self, other: Any) -> Any:
        """``A + B``, of any operator."""
        return Sum(self, other) if isinstance(other, Operator) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        """``B + A``."""
        return Sum(other, self) if isinstance(other, Operator) else NotImplemented

    def __sub__(self, other: Any) -> Any:
        """``A - B``, of any operator that can be scaled."""
        if not isinstance(other, Operator):
            return NotImplemented
        scalable: Any = other
        return Sum(self, -1 * scalable)

    def __rsub__(self, other: Any) -> Any:
        """``B - A``."""
        return Sum(other, -self) if isinstance(other, Operator) else NotImplemented

    @abstractmethod
    def __neg__(self) -> Any:
        """``-A``."""

    def __matmul__(self, other: Any) -> Any:
        """``A @ B`` of any operator, ``A @ X`` of a tensor."""
        return Product(self, other) if isinstance(other, Operator) else super().__matmul__(other)

    def __rmatmul__(self, other: Any) -> Any:
        """``B @ A`` of any operator, ``X @ A`` of a tensor."""
        return Product(other, self) if isinstance(other, Operator) else super().__rmatmul__(other)


class Lazy(Composite, Combined):
    """Operators made of others, which add and multiply to further ones."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_arguments(cls, _CHECKED)
        round_once(cls)

    def __neg__(self) -> Any:
        """``-A``."""
        return self * -1

    def __mul__(self, c: Any) -> Any:
        """``c A`` for a number or a tensor of the batch shape."""
        return self._times(c, "*", operator.mul)

    def __rmul__(self, c: Any) -> Any:
        """``c A`` for a number or a tensor of the batch shape."""
        return self * c

    def __truediv__(self, c: Any) -> Any:
        """``A / c`` for a number or a tensor of the batch shape."""
        return self._times(c, "/", operator.truediv)

    def _times(self, c: Any, operation: str, times: Callable[[Any, Any], Any]) -> Any:
        if not isinstance(c, Real | Tensor):
            return NotImplemented
        check_scalar(self, c, operation)
        one_each = isinstance(c, Tensor) and c.ndim
        return self._scaled(lambda A: times(expand(A, self.batch_shape) if one_each else A, c))

    @abstractmethod
    def _scaled(self, scale: Callable[[Any], Any]) -> Any:
        """``c A``, where ``scale`` multiplies a part by ``c``."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.parts))})"


def expand(A: Any, batch_shape: Sequence[int]) -> Any:
    """``A`` again and again along further batch dimensions, where it is made of tensors."""
    if hasattr(A, "expand"):
        return A.expand(*batch_shape)
    if isinstance(A, Composite):
        return type(A)(*(expand(part, batch_shape) for part in A.parts))
    first, stored = len(A.batch_shape), isinstance(A, Stored)
    return A.map(lambda t: t.expand((*batch_shape, *t.shape[first:]))) if stored else A


class _OfOneSize(Lazy):
    """What sums and products share: parts of one size, whose kind is not their own."""

    def __init__(self, *parts: Operator) -> None:
        super().__init__(*self._flat(parts))
        sizes = [A.n for A in self.parts]
        if len({*sizes}) > 1:
            raise ValueError(f"{type(self).__name__}: expected operators of one size, got {sizes}")

    def _flat(self, parts: tuple[Any, ...]) -> Iterator[Any]:
        for part in parts:
            yield from part.parts if type(part) is type(self) else (part,)

    @property
    def shape(self) -> Size:
        """``[..., n, n]``."""
        n = self.parts[0].n
        return Size((*self._joint_batch_shape(), n, n))


class Sum(_OfOneSize):
    """``A_1 + ... + A_k`` of any operators of one size, whose batch shapes broadcast.

    For members of different structures, whose sum is in neither. ``solve``, ``logdet`` and norms
    write the sum out.

    >>> import torch
    >>> from structured import Diagonal, Sum, parse
    >>> A = Sum(Diagonal(torch.tensor([1.0, 2.0])), parse("circulant").identity(2))
    >>> A.apply(torch.ones(2, 1)).flatten(), A.trace()
    (tensor([2., 3.]), tensor(5.))

    Raises:
        TypeError: If a part is no operator.
        ValueError: If there is none, or their sizes, dtypes, devices or batch shapes do not fit.
    """

    @property
    def mT(self) -> Sum:
        """``A_1^T + ... + A_k^T``."""
        return Sum(*(A.mT for A in self.parts))

    def _sum(self, function: Callable[[Any], Tensor]) -> Tensor:
        return functools.reduce(torch.add, map(function, self.parts))

    def apply(self, X: Tensor) -> Tensor:
        """``A_1 X + ... + A_k X``."""
        return self._sum(lambda A: A.apply(X))

    def apply_transpose(self, X: Tensor) -> Tensor:
        """``A_1^T X + ... + A_k^T X``."""
        return self._sum(lambda A: A.apply_transpose(X))

    def solve(self, X: Tensor) -> Tensor:
        """``A^{-1} X`` of the sum ``A``, written out; solved in float32 at least."""
        return super().solve(X)

    def to_dense(self) -> Tensor:
        """Write the sum out."""
        return self._sum(lambda A: A.to_dense())

    def diagonal(self) -> Tensor:
        """Sum of the diagonals."""
        return self._sum(lambda A: A.diagonal())

    def trace(self) -> Tensor:
        """Sum of the traces."""
        return self._sum(lambda A: A.trace())

    def logdet(self) -> Tensor:
        """``log |det A|`` of the sum ``A``, written out in float32 at least."""
        return super().logdet()

    def _scaled(self, scale: Callable[[Any], Any]) -> Sum:
        """``c A_1 + ... + c A_k``; each can be scaled."""
        return Sum(*map(scale, self.parts))


class Product(_OfOneSize):
    """``A_1 ... A_k`` of any operators of one size, whose batch shapes broadcast.

    For members of different structures, whose product is in neither. Products with tensors and
    solves go through the factors; ``trace``, ``diagonal`` and norms write them out.

    Raises:
        TypeError: If a part is no operator.
        ValueError: If there is none, or their sizes, dtypes, devices or batch shapes do not fit.
    """

    @property
    def mT(self) -> Product:
        """``A_k^T ... A_1^T``."""
        return Product(*(A.mT for A in reversed(self.parts)))

    def apply(self, X: Tensor) -> Tensor:
        """``A_1 (... (A_k X))``."""
        return functools.reduce(lambda Y, A: A.apply(Y), reversed(self.parts), X)

    def apply_transpose(self, X: Tensor) -> Tensor:
        """``A_k^T (... (A_1^T X))``."""
        return functools.reduce(lambda Y, A: A.apply_transpose(Y), self.parts, X)

    def solve(self, X: Tensor) -> Tensor:
        """``A_k^{-1} (... (A_1^{-1} X))``, by the solves of the factors."""
        return functools.reduce(lambda Y, A: A.solve(Y), self.parts, X)

    def inverse(self) -> Product:
        """``A_k^{-1} ... A_1^{-1}``, of factors that have an inverse."""
        parts: tuple[Any, ...] = self.parts
        return Product(*(A.inverse() for A in reversed(parts)))

    def to_dense(self) -> Tensor:
        """Write the product out."""
        *others, last = self.parts
        return functools.reduce(lambda Y, A: A.apply(Y), reversed(others), last.to_dense())

    def logdet(self) -> Tensor:
        """``log|det A_1| + ... + log|det A_k|``."""
        return functools.reduce(torch.add, (A.logdet() for A in self.parts))

    def _scaled(self, scale: Callable[[Any], Any]) -> Product:
        """``(c A_1) ... A_k``; the first can be scaled."""
        return Product(scale(self.parts[0]), *self.parts[1:])


class Outer(Lazy):
    """``A A^T``, symmetric positive semi-definite, for any one operator ``A``.

    Products and solves are two of ``A``; the other operations are closer to it.

    Raises:
        TypeError: If ``A`` is no operator.
    """

    def __init__(self, A: Operator) -> None:
        super().__init__(A)

    @property
    def A(self) -> Operator:
        """The root."""
        return self.parts[0]

    @property
    def shape(self) -> Size:
        """``[..., n, n]``."""
        return self.A.shape

    @property
    def mT(self) -> Outer:
        """Symmetric: its own transpose."""
        return self

    def apply(self, X: Tensor) -> Tensor:
        """``A (A^T X)``."""
        return self.A.apply(self.A.apply_transpose(X))

    def apply_transpose(self, X: Tensor) -> Tensor:
        """The same as :meth:`apply`."""
        return self.apply(X)

    def to_dense(self) -> Tensor:
        """``A A^T``, written out."""
        dense = self.A.to_dense()
        return dense @ dense.mT

    def solve(self, X: Tensor) -> Tensor:
        """``A^{-T} (A^{-1} X)``."""
        return self.A.mT.solve(self.A.solve(X))

    def inverse(self) -> Outer:
        """``A^{-T} A^{-1}``, of an ``A`` that has an inverse."""
        A: Any = self.A
        return Outer(A.inverse().mT)

    def diagonal(self) -> Tensor:
        """Sums of squares of the rows of ``A``."""
        return self.A.squared_rows()

    def trace(self) -> Tensor:
        """Square of the Frobenius norm of ``A``."""
        return self.A.frobenius_norm().square()

    def logdet(self) -> Tensor:
        """``2 log|det A|``."""
        return 2 * self.A.logdet()

    def spectral_norm(self) -> Tensor:
        """Square of that of ``A``."""
        return self.A.spectral_norm().square()

    def _scaled(self, scale: Callable[[Any], Any]) -> Product:
        """``(c A) A^T``, a product; ``A`` can be scaled."""
        return Product(scale(self.A), self.A.mT)
