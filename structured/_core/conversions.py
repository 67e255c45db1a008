"""Conversions of whatever stores tensors, named as those of a tensor."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor


class Convertible:
    """What stores ``tensors()`` and converts them by ``to()``."""

    def tensors(self) -> tuple[Tensor, ...]:
        """The stored tensors."""
        raise NotImplementedError

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Convert dtype or device, as :meth:`torch.Tensor.to`."""
        raise NotImplementedError

    def numel(self) -> int:
        """How many numbers are stored, those of the whole batch."""
        return sum(t.numel() for t in self.tensors())

    def double(self) -> Self:
        """In float64."""
        return self.to(torch.float64)

    def float(self) -> Self:
        """In float32."""
        return self.to(torch.float32)

    def half(self) -> Self:
        """In float16."""
        return self.to(torch.float16)

    def bfloat16(self) -> Self:
        """In bfloat16."""
        return self.to(torch.bfloat16)
