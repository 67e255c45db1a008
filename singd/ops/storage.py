"""Forms in which numbers are stored in fewer bits than they are computed with.

| form | a number takes | unit of a number ``x`` |
|---|---|---|
| ``"bfloat16+8"`` | 24 bits | ``2^-15`` of the power of two below ``x`` |
| ``"int8"`` | 8 bits, and 32 for each 64 numbers | 1/127 of the largest of 64 numbers |

Numbers are rounded to one of their two neighbours, by chance and without bias, or to the nearest. A
number that is not finite stays so; in ``"int8"`` it takes the numbers of its block along.

Sources: the split of Kalamkar et al. (arXiv 2005.04680), with a signed remainder; blocks with
scales as in Dettmers et al. (arXiv 2110.02861), with equal steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from singd.ops.stochastic_rounding import Rounding

BLOCK = 64
"""Consecutive numbers of one tensor, in the order of memory, that share a scale."""

_LEVELS = 127.0


class Form(ABC):
    """How a tensor is stored, as :attr:`count` tensors."""

    count = 2

    @abstractmethod
    def encode(self, x: Tensor, rounding: Rounding | None, names: Sequence[str]) -> list[Tensor]:
        """What is stored of ``x``.

        Args:
            x: Numbers ``[b, ...]``, one item for each name; on the meta device for shapes alone.
            rounding: Rounds by chance; ``None`` for rounding to nearest.
            names: Names of the items, which the noise depends on.
        """

    @abstractmethod
    def decode(self, stored: Sequence[Tensor]) -> Tensor:
        """The numbers, of one item or of items side by side."""

    @abstractmethod
    def fits(self, stored: Sequence[Tensor], shape: torch.Size) -> bool:
        """Whether the first of some tensors are what this form stores of one item of a shape."""


class Plain(Form):
    """As they are.

    Args:
        dtype: Data type; ``None`` for that of the numbers.
    """

    count = 1

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype

    def encode(self, x: Tensor, rounding: Rounding | None, names: Sequence[str]) -> list[Tensor]:
        """The numbers in the data type, by :class:`~singd.ops.stochastic_rounding.Rounding`."""
        dtype = self.dtype or x.dtype
        return [x.to(dtype) if rounding is None else rounding(x, dtype, names)]

    def decode(self, stored: Sequence[Tensor]) -> Tensor:
        """The tensor itself."""
        return stored[0]

    def fits(self, stored: Sequence[Tensor], shape: torch.Size) -> bool:
        """Real numbers of the shape."""
        return bool(stored) and stored[0].is_floating_point() and stored[0].shape == shape


class Split(Form):
    """The nearest bfloat16, and the next 8 bits of the mantissa as its signed remainder.

    The bits of a float32 without the lowest 8 are an integer ``256 high + low``, with ``low`` in
    [-128, 127]. The bits of the bfloat16 are ``high``.
    """

    def encode(self, x: Tensor, rounding: Rounding | None, names: Sequence[str]) -> list[Tensor]:
        """``[high, low]``, bfloat16 and int8, both shaped like ``x``."""
        special = (torch.nan, torch.inf, -torch.inf)  # any NaN as PyTorch's: its sum has no carry
        bits = torch.nan_to_num(x.float(), *special).view(torch.int32)
        bits += 0x80 if rounding is None else rounding.noise(x, names, 8)
        low = bits.bitwise_right_shift_(8).to(torch.int8)  # the lowest byte, with its sign
        high = bits.add_(0x80).bitwise_right_shift_(8).to(torch.int16)
        return [high.view(torch.bfloat16), low]

    def decode(self, stored: Sequence[Tensor]) -> Tensor:
        """The numbers in float32."""
        high, low = stored
        bits = high.view(torch.int16).to(torch.int32)
        return bits.bitwise_left_shift_(8).add_(low).bitwise_left_shift_(8).view(torch.float32)

    def fits(self, stored: Sequence[Tensor], shape: torch.Size) -> bool:
        """Both tensors have the shape of the numbers."""
        dtypes = [t.dtype for t in stored[:2]]
        return dtypes == [torch.bfloat16, torch.int8] and all(t.shape == shape for t in stored[:2])


class Blocks(Form):
    """Integers from -127 to 127 in units of 1/127 of the largest magnitude of their block."""

    def encode(self, x: Tensor, rounding: Rounding | None, names: Sequence[str]) -> list[Tensor]:
        """``[largest, codes]``: float32 ``[b, blocks]``, and int8 shaped like ``x``."""
        flat = x.float().reshape(len(x), -1)
        padded = torch.nn.functional.pad(flat, (0, -flat.shape[1] % BLOCK))
        blocks = padded.unflatten(1, (-1, BLOCK))
        largest = blocks.abs().amax(-1)
        units = (blocks / largest[..., None] * _LEVELS).nan_to_num_(0.0, 0.0, 0.0)
        units = units.flatten(1)[:, : flat.shape[1]].reshape(x.shape)
        if rounding is None:
            codes = units.round_()
        else:
            codes = units.add_(rounding.noise(x, names).float().mul_(2.0**-16)).floor_()
        return [largest, codes.to(torch.int8)]

    def decode(self, stored: Sequence[Tensor]) -> Tensor:
        """The numbers in float32; the largest of a block exactly."""
        largest, codes = stored
        flat = codes.flatten(largest.ndim - 1).float()
        scales = largest.repeat_interleave(BLOCK, -1)[..., : flat.shape[-1]]
        return flat.div_(_LEVELS).mul_(scales).view(codes.shape)

    def fits(self, stored: Sequence[Tensor], shape: torch.Size) -> bool:
        """A scale for each block, and a code for each number."""
        return (
            [t.dtype for t in stored[:2]] == [torch.float32, torch.int8]
            and stored[0].shape == (-(-shape.numel() // BLOCK),)
            and stored[1].shape == shape
        )


FORMS: Mapping[str, Form] = MappingProxyType({"bfloat16+8": Split(), "int8": Blocks()})
"""The forms by the names of options."""

PLAIN = Plain()


def form_of(name: str | None, t: Tensor, least: int) -> Form:
    """The form of one tensor of a member.

    Args:
        name: One of :data:`FORMS`; ``None`` for the data type that the tensor has.
        t: The tensor, of one matrix.
        least: In ``"int8"`` tensors of as many numbers or fewer stay in float32: they take little,
            and a diagonal that is rounded to zero would never leave it.
    """
    if name is None or (name == "int8" and t.numel() <= least):
        return Plain(t.dtype)
    return FORMS[name]


def recognize(stored: Sequence[Tensor], shapes: Sequence[torch.Size]) -> list[Form] | None:
    """The forms in which tensors of some shapes are stored; ``None`` if they are in none.

    Args:
        stored: What is stored of one item, the tensors of all forms in a row.
        shapes: Shapes of the numbers of every tensor.
    """
    found: list[Form] = []
    rest = list(stored)
    for shape in shapes:
        form = next((f for f in (*FORMS.values(), PLAIN) if f.fits(rest, shape)), None)
        if form is None:
            return None
        found.append(form)
        rest = rest[form.count :]
    return None if rest else found


def recode(stored: Sequence[Tensor], forms: Sequence[Form], wanted: Sequence[Form]) -> list[Tensor]:
    """What is stored of one item, in other forms, rounded to nearest where they differ."""
    found, rest = [], list(stored)
    for form, new in zip(forms, wanted, strict=True):
        own, rest = rest[: form.count], rest[form.count :]
        if type(form) is not type(new):
            own = [t[0] for t in new.encode(form.decode(own)[None], None, [""])]
        found += own
    return found


def decode(stored: Sequence[Tensor], forms: Sequence[Form]) -> list[Tensor]:
    """The numbers of some tensors in a row, each stored in its form."""
    found, rest = [], list(stored)
    for form in forms:
        found.append(form.decode(rest[: form.count]))
        rest = rest[form.count :]
    return found
