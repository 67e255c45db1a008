"""Immutable records of tensors: dataclasses that are pytrees, move between devices, and nest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Self, dataclass_transform

import torch
from torch import Size, Tensor
from torch.utils import _pytree as pytree

from structured._core.conversions import Convertible
from structured._core.statics import Shared, convert, has_numbers, map_value


def static(**kwargs: Any) -> Any:
    """Mark a field as part of the structure, shared by all its members, not a stored number.

    Sums, scalings and :meth:`Stored.tensors` pass static fields by. Two members belong to the same
    structure only if their static fields are equal (tensors: equal numbers). A conversion of the
    dtype converts static floating-point and complex tensors; integer and boolean ones, such as
    permutations and masks, only move between devices.
    """
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(
    frozen_default=True, eq_default=False, field_specifiers=(dataclasses.field, static)
)
class Stored(Convertible):
    """An immutable dataclass of tensors, or of further records; subclassing is all it takes.

    Everything here is about the tensors as such, in the order of the fields, and blind to what
    matrix they stand for.
    """

    dimensions: ClassVar[tuple[str, ...]] = ()
    """Trailing dimensions of each field that is not static, such as ``("p p", "p q", "q q")``.

    Equal letters stand for equal sizes, and what comes before is one batch shape for all fields.
    The constructor checks it where it is given.
    """

    _fields: tuple[str, ...] = ()
    _static: tuple[str, ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]  # made a dataclass above
        cls._fields = tuple(f.name for f in fields if not f.metadata.get("static"))
        cls._static = tuple(f.name for f in fields if f.metadata.get("static"))
        pytree.register_pytree_node(cls, cls._flatten, cls._unflatten)

    def __post_init__(self) -> None:
        parts = [getattr(self, name) for name in self._fields]
        for name, part in zip(self._fields, parts, strict=True):
            if not isinstance(part, Tensor | Stored):
                raise TypeError(
                    f"{type(self).__name__}.{name}: expected a tensor or a structured matrix, "
                    f"got {type(part).__name__}"
                )
            if part.dtype != parts[0].dtype or part.device != parts[0].device:
                raise ValueError(
                    f"{type(self).__name__}: expected {name} in {parts[0].dtype} on "
                    f"{parts[0].device} as {self._fields[0]}, got {part.dtype} on {part.device}"
                )
        self._check_real()
        self._check_dimensions()

    def _check_dimensions(self) -> None:
        sizes: dict[str, int] = {}
        batch: Size | None = None
        for name, letters in zip(self._fields, self.dimensions, strict=False):
            core, shape = letters.split(), getattr(self, name).shape
            start = len(shape) - len(core)
            fits = start >= 0 and (batch is None or shape[:start] == batch)
            for letter, size in zip(core, shape[start:], strict=True) if fits else ():
                fits = fits and sizes.setdefault(letter, size) == size
            if not fits:
                front = ["..."] if batch is None else [str(size) for size in batch]
                expected = ", ".join(front + [str(sizes.get(letter, letter)) for letter in core])
                raise ValueError(
                    f"{type(self).__name__}.{name}: expected shape [{expected}], got {list(shape)}"
                )
            batch = shape[:start]

    def _check_core(self, name: str, *core: int) -> None:
        """Raise unless the trailing dimensions of a field are these."""
        shape = getattr(self, name).shape
        if shape[-len(core) :] != core:
            expected = ", ".join(map(str, ("...", *core)))
            raise ValueError(
                f"{type(self).__name__}.{name}: expected shape [{expected}], got {list(shape)}"
            )

    def _check_real(self) -> None:
        if not self.dtype.is_floating_point:
            raise ValueError(
                f"{type(self).__name__}: expected real floating-point numbers, got {self.dtype}"
            )

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the stored tensors."""
        dtype: torch.dtype = getattr(self, self._fields[0]).dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Device of the stored tensors."""
        device: torch.device = getattr(self, self._fields[0]).device
        return device

    def tensors(self) -> tuple[Tensor, ...]:
        """The stored tensors, nested members flattened, in the order of the fields."""
        out: list[Tensor] = []
        for name in self._fields:
            part = getattr(self, name)
            if isinstance(part, Stored):
                out.extend(part.tensors())
            else:
                out.append(part)
        return tuple(out)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Self:
        """The member of the same structure that stores ``tensors``, ordered as :meth:`tensors`."""
        parts: list[Any] = []
        start = 0
        for name in self._fields:
            part = getattr(self, name)
            if isinstance(part, Stored):
                stop = start + len(part.tensors())
                parts.append(part.with_tensors(tensors[start:stop]))
            else:
                stop = start + 1
                parts.extend(tensors[start:stop])
            start = stop
        if len(tensors) != start:
            raise ValueError(f"{type(self).__name__}: expected {start} tensors, got {len(tensors)}")
        return self._build(parts)._checked()

    def map(self, function: Callable[..., Tensor], *others: Self) -> Self:
        """Apply ``function`` to each stored tensor (and those of ``others``, side by side)."""
        return self._map(function, *others)._checked()

    def zeros_like(self) -> Self:
        """The zero member of this structure, size, batch shape, dtype and device."""
        return self._map(torch.zeros_like)

    def clone(self) -> Self:
        """A copy that shares no memory."""
        return self._map(torch.clone)

    def detach(self) -> Self:
        """The same numbers, cut from the autograd graph."""
        return self._map(Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Convert dtype or device, as :meth:`torch.Tensor.to`.

        Raises:
            ValueError: If the numbers would not be real floating-point numbers.
        """
        if len(args) == 1 and args[0] is self.dtype and not kwargs and not self._shares_numbers():
            return self
        moved = self._map(lambda t: t.to(*args, **kwargs))
        moved._check_real()
        return moved.map_static(lambda t: convert(t, moved.device, moved.dtype))

    @property
    def layout(self) -> tuple[Any, ...]:
        """Class, static fields and shapes, which addable members share, as a hashable tuple."""
        return self.layout_without(0)

    def layout_without(self, batch_ndim: int) -> tuple[Any, ...]:
        """:attr:`layout` but for the first ``batch_ndim`` dimensions of the stored tensors."""
        parts = []
        for name in self._fields:
            part = getattr(self, name)
            nested = isinstance(part, Stored)
            parts.append(part.layout_without(batch_ndim) if nested else part.shape[batch_ndim:])
        for name in self._static:
            value = getattr(self, name)
            parts.append(Shared(value) if has_numbers(value) else value)
        return (type(self), *parts)

    def key(self, batch_ndim: int) -> tuple[Any, ...]:
        """What :attr:`layout` says, as a tuple of constants: no numbers of static tensors.

        Args:
            batch_ndim: Number of leading dimensions to leave out of the shapes.
        """
        parts = []
        for name in self._fields:
            part = getattr(self, name)
            nested = isinstance(part, Stored)
            parts.append(part.key(batch_ndim) if nested else tuple(part.shape[batch_ndim:]))
        statics = []
        for name in self._static:
            value = getattr(self, name)
            statics.append(value.shape if isinstance(value, Tensor) else value)
        return (type(self), tuple(parts), tuple(statics))

    def static_tensors(self) -> tuple[Tensor, ...]:
        """The tensors among the static fields, those of nested members first."""
        out: list[Tensor] = []
        for name in self._fields:
            part = getattr(self, name)
            if isinstance(part, Stored):
                out.extend(part.static_tensors())
        statics = (getattr(self, name) for name in self._static)
        return (*out, *(value for value in statics if isinstance(value, Tensor)))

    def map_static(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Apply ``function`` to the tensors of static fields, nested members' too."""
        parts: list[Any] = [getattr(self, name) for name in self._fields]
        statics: list[Any] = [getattr(self, name) for name in self._static]
        return self._unflatten(
            [p.map_static(function) if isinstance(p, Stored) else p for p in parts],
            [map_value(function, value) for value in statics],
        )

    # What we compute ourselves is not checked again: on small matrices that costs as much as they.

    def _build(self, parts: Sequence[Any]) -> Self:
        """A member with the given fields and our static ones."""
        return self._unflatten(parts, [getattr(self, name) for name in self._static])

    def _map(self, function: Callable[..., Tensor], *others: Self) -> Self:
        """:meth:`map` for functions of ours."""
        parts: list[Any] = []
        for name in self._fields:
            part, *theirs = [getattr(each, name) for each in (self, *others)]
            nested = isinstance(part, Stored)
            parts.append(part._map(function, *theirs) if nested else function(part, *theirs))
        return self._build(parts)

    def _checked(self) -> Self:
        """This, if it could have been made by its class."""
        for name in self._fields:
            part = getattr(self, name)
            if isinstance(part, Stored):
                part._checked()
        self.__post_init__()
        return self

    def _shares_numbers(self) -> bool:
        """Whether there are tensors in static fields, nested members' too."""
        parts = (getattr(self, name) for name in self._fields)
        nested = any(part._shares_numbers() for part in parts if isinstance(part, Stored))
        return nested or any(has_numbers(getattr(self, name)) for name in self._static)

    def _flatten(self) -> tuple[list[Any], tuple[Any, ...]]:
        return (
            [getattr(self, name) for name in self._fields],
            tuple(getattr(self, name) for name in self._static),
        )

    @classmethod
    def _unflatten(cls, parts: Iterable[Any], statics: Iterable[Any]) -> Self:
        member = object.__new__(cls)  # transforms put placeholders here: no checks
        for names, values in ((cls._fields, parts), (cls._static, statics)):
            for name, value in zip(names, values, strict=True):
                object.__setattr__(member, name, value)  # frozen; torch.compile follows this
        return member


def zero_of(
    key: tuple[Any, ...],
    statics: Iterable[Tensor],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Any:
    """The zero record with the given :meth:`Stored.key`.

    Args:
        key: Made without batch dimensions.
        statics: The static tensors, ordered as :meth:`Stored.static_tensors`.
        device: Of its tensors.
        dtype: Of its numbers.
    """
    rest, where = iter(statics), torch.device(device)
    cls, parts, values = key
    built = [
        zero_of(part, rest, device=where, dtype=dtype)
        if part and isinstance(part[0], type)
        else torch.zeros(part, dtype=dtype, device=where)
        for part in parts
    ]
    static = [
        convert(next(rest), where, dtype)
        if isinstance(v, Size)
        else map_value(lambda t: convert(t, where, dtype), v)
        for v in values
    ]
    return cls._unflatten(built, static)
