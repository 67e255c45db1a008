"""Linear layers whose weight is stored transposed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from singd.layers.base import Layer


class Transposed(Layer):
    """Linear layers whose weight is ``[d_in, d_out]``."""

    def shape(self, module: Any) -> tuple[int, ...]:
        """``(d_out, d_in)``."""
        d_in, d_out = module.weight.shape
        return d_out, d_in

    def to_matrix(self, module: Any, weight: Tensor) -> Tensor:
        """``[d_out, d_in]``."""
        return weight.mT

    def from_matrix(self, module: Any, matrix: Tensor) -> Tensor:
        """``[d_in, d_out]``."""
        return matrix.mT
