"""Operators made of any number of others: copies, conversions and pytrees go through the parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import torch
from torch import Size, Tensor
from torch.utils import _pytree as pytree

from structured._core.conversions import Convertible
from structured._core.operator import Operator


class Composite(Convertible, Operator):
    """An operator made of others of one dtype, on one device, whose batch shapes broadcast.

    A pytree whose children are the parts: what is registered as a pytree itself, such as every
    member of a structure, falls into its tensors, and any other operator is a leaf.

    Args:
        parts: At least one operator.

    Raises:
        TypeError: If a part is no operator.
        ValueError: If there is none, or their dtypes, devices or batch shapes do not fit.
    """

    parts: tuple[Operator, ...]

    def __init__(self, *parts: Operator) -> None:
        _check(type(self).__name__, parts)
        self.parts = parts

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        pytree.register_pytree_node(cls, lambda P: (list(P.parts), None), cls._unflatten)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the parts."""
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of the parts."""
        return self.parts[0].device

    def _joint_batch_shape(self) -> Size:
        return _broadcast([A.batch_shape for A in self.parts])

    def tensors(self) -> tuple[Tensor, ...]:
        """The stored tensors of the parts, in order."""
        return tuple(t for t in pytree.tree_leaves(self) if isinstance(t, Tensor))

    def with_tensors(self, tensors: Sequence[Tensor]) -> Self:
        """The same operator of other numbers, ordered as :meth:`tensors`."""
        expected, rest = len(self.tensors()), iter(tensors)
        if len(tensors) != expected:
            raise ValueError(
                f"{type(self).__name__}: expected {expected} tensors, got {len(tensors)}"
            )
        return self.map(lambda _: next(rest))

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Apply ``function`` to each stored tensor."""
        return type(self)(*pytree.tree_map_only(Tensor, function, self).parts)

    def map_static(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Apply ``function`` to the tensors of static fields of the parts."""
        parts: Iterable[Any] = self.parts
        mapped = (A.map_static(function) if hasattr(A, "map_static") else A for A in parts)
        return type(self)(*mapped)

    @property
    def layout(self) -> tuple[Any, ...]:
        """What two operators of the same parts have in common, but for the stored numbers."""
        return (type(self), *(getattr(A, "layout", A) for A in self.parts))

    def clone(self) -> Self:
        """A copy that shares no memory."""
        return self.map(torch.clone)

    def detach(self) -> Self:
        """The same numbers, cut from the autograd graph."""
        return self.map(Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Convert dtype or device of every part, as :meth:`torch.Tensor.to`."""
        parts: Iterable[Any] = self.parts
        return type(self)(*(A.to(*args, **kwargs) for A in parts))

    @classmethod
    def _unflatten(cls, parts: Iterable[Any], _: None) -> Self:
        made = object.__new__(cls)  # transforms put placeholders here: no checks
        made.parts = tuple(parts)
        return made


def _check(name: str, parts: Sequence[Any]) -> None:
    if not parts:
        raise ValueError(f"{name}: expected at least one operator, got none")
    for A in parts:
        if not isinstance(A, Operator):
            raise TypeError(f"{name}: expected operators, got {type(A).__name__}")
        if (A.dtype, A.device) != (parts[0].dtype, parts[0].device):
            raise ValueError(
                f"{name}: expected operators of one dtype and device, got {parts[0].dtype} on "
                f"{parts[0].device} and {A.dtype} on {A.device}"
            )
    try:
        _broadcast([A.batch_shape for A in parts])
    except RuntimeError:
        shapes = ", ".join(str(list(A.batch_shape)) for A in parts)
        raise ValueError(f"{name}: expected batch shapes that broadcast, got {shapes}") from None


def _broadcast(shapes: Sequence[Size]) -> Size:
    alike = all(shape == shapes[0] for shape in shapes)
    return shapes[0] if alike else torch.broadcast_shapes(*shapes)
