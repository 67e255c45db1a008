"""Attention modules: four matrix products inside one function, which calls no module for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from singd.layers.base import Layer


class PackedProjection(Layer):
    """Queries, keys or values from their rows of one weight ``[3 d, d]``.

    Args:
        name: ``"q"``, ``"k"`` or ``"v"``.
    """

    weight, bias = "in_proj_weight", "in_proj_bias"

    def __init__(self, name: str) -> None:
        self.name = name

    def rows(self, module: Any) -> slice:
        """A third of the rows."""
        d, index = module.embed_dim, "qkv".index(self.name)
        return slice(index * d, (index + 1) * d)

    def shape(self, module: Any) -> tuple[int, ...]:
        """``(d, d)``."""
        return module.embed_dim, module.embed_dim


class Projection(Layer):
    """Queries, keys or values from a weight of their own. The bias is stored with that of others.

    Args:
        name: ``"q"``, ``"k"`` or ``"v"``.
    """

    joins_bias = False

    def __init__(self, name: str) -> None:
        self.name, self.weight = name, f"{name}_proj_weight"


class Attention(Layer):
    """Attention: its projections of queries, keys and values; that of its output is a module."""

    packed = tuple(PackedProjection(name) for name in "qkv")
    separate = tuple(Projection(name) for name in "qkv")

    def products(self, module: Any) -> Sequence[Layer]:
        """Rows of one packed weight, or three weights where keys and values differ in size."""
        return self.separate if module.in_proj_weight is None else self.packed
