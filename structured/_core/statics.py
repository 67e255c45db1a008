"""Static values of a record: tensors and records that belong to the structure, not its numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def convert(t: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A static tensor beside numbers of ``dtype``: indices and masks are no numbers, and stay."""
    if t.is_floating_point():
        return t.to(device, dtype)
    return (
        t.to(device, torch.promote_types(dtype, torch.complex64))
        if t.is_complex()
        else t.to(device)
    )


def has_numbers(value: Any) -> bool:
    """Whether a static value is a tensor or a record of tensors, such as an operator."""
    return isinstance(value, Tensor) or hasattr(value, "map_static")


def map_value(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply ``function`` to every tensor of a static value."""
    if isinstance(value, Tensor):
        return function(value)
    return value.map(function).map_static(function) if has_numbers(value) else value


class Shared:
    """A static tensor or record in a layout: equal to itself, and to one with the same numbers."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return hash(self.value.shape)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Shared):
            return False
        mine, theirs = self.value, other.value
        if mine is theirs:
            return True
        alike = (mine.shape, mine.dtype, mine.device) == (theirs.shape, theirs.dtype, theirs.device)
        if not alike or isinstance(mine, Tensor) != isinstance(theirs, Tensor):
            return False
        if isinstance(mine, Tensor):
            return torch.equal(mine, theirs)
        pairs = zip(mine.tensors(), theirs.tensors(), strict=False)
        same: bool = mine.layout == theirs.layout and all(torch.equal(a, b) for a, b in pairs)
        return same


def are_fake(statics: Sequence[Tensor]) -> bool:
    """Whether some are PyTorch's fake tensors; to the compiler all are, and it has the numbers."""
    return not torch.compiler.is_compiling() and any(hasattr(t, "fake_mode") for t in statics)
