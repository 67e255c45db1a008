"""Embeddings as matrix products with one-hot inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from singd.layers.base import Layer
from singd.layers.linear import Transposed


class Embedding(Transposed):
    """Embeddings: the input picks a row, so its factor is diagonal and counts how often."""

    input_structure = "diagonal"

    def products(self, module: Any) -> Sequence[Layer]:
        """None where gradients are sparse: AdamW then says that it cannot step them."""
        return () if module.sparse else (self,)

    def samples_first(self, module: Any, x: Tensor, samples: int | None) -> Tensor:
        """Indices ``[...]`` have no last dimension of features."""
        if x.is_floating_point():
            return super().samples_first(module, x, samples)
        return super().samples_first(module, x[..., None], samples)[..., 0]

    def inputs(self, module: Any, x: Tensor) -> Tensor:
        """One-hot rows, ``[N, P, d_in]``; the padding row is never picked."""
        hot = F.one_hot(self._picked(x), module.num_embeddings)
        if module.padding_idx is not None:
            hot[..., module.padding_idx] = 0
        return hot.to(module.weight.dtype)

    def square_sums(
        self, module: Any, x: Tensor, approximation: str, ones: bool
    ) -> tuple[Tensor, int]:
        """How often every row was picked."""
        counts = torch.bincount(x.flatten(), minlength=module.num_embeddings)
        if module.padding_idx is not None:
            counts[module.padding_idx] = 0
        return counts.to(torch.promote_types(module.weight.dtype, torch.float32)), x.numel()

    def inputs_along(self, module: Any, x: Tensor, u: Tensor) -> Tensor:
        """Rows of ``u``, without one-hot rows; the padding row has no gradient."""
        if module.padding_idx is not None:
            u = u.clone()
            u[module.padding_idx] = 0
        return u[self._picked(x)]

    def _picked(self, x: Tensor) -> Tensor:
        """The rows that are picked, ``[N, P]``."""
        N = x.shape[0] if x.ndim else 1
        return x.reshape(N, x.numel() // max(N, 1))
