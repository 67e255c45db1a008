"""What a method stores, and what it is given: records without behaviour of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor

from singd.capture.statistics import Statistic
from structured import StructuredMatrix

Options = Mapping[str, Any]
"""The options of a parameter group."""

Products = dict[str, Any]
"""Operators made of factors, by name, that are cached until the next update."""


@dataclass(frozen=True)
class Factors:
    """What a method stores of a weight matrix. Derive a frozen dataclass of structured members.

    Fields are members, ``None`` for those that the options make unnecessary, or tuples of members
    (numbered in checkpoints). Equal matrices are stored side by side: members then have a first
    batch dimension.
    """

    def members(self) -> dict[str, StructuredMatrix]:
        """The members by name."""
        found: dict[str, StructuredMatrix] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if isinstance(value, tuple):
                found |= {f"{name}_{i}": member for i, member in enumerate(value)}
            elif value is not None:
                found[name] = value
        return found

    def with_members(self, members: Mapping[str, StructuredMatrix]) -> Self:
        """The same record with other members of these names."""
        changed: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if isinstance(value, tuple):
                changed[name] = tuple(members[f"{name}_{i}"] for i in range(len(value)))
            elif value is not None:
                changed[name] = members[name]
        return replace(self, **changed)

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """``function`` of every tensor."""
        return self.with_members({k: m.map(function) for k, m in self.members().items()})


@dataclass
class Averages:
    """Statistics averaged over rows, of ``S_K`` and ``S_C``; and rows on a rank, of each matrix."""

    input: Statistic
    grad: Statistic
    rows: Sequence[float] = ()


@dataclass
class Stack:
    """Equal matrices side by side whose factors are due.

    Attributes:
        factors: Their factors, along the first dimension.
        statistics: Their :class:`Averages`; or gradients, where a method needs no activations.
        products: What was cached of the factors.
    """

    factors: Any
    statistics: Any
    products: Products
    load: Callable[[str], StructuredMatrix] | None = None
    """Gives a member of the factors anew, where that costs less memory than to hold it."""

    def member(self, name: str) -> Callable[[], StructuredMatrix]:
        """A function that gives a member of the factors; what it holds is as little as can be."""
        if self.load is not None:
            return functools.partial(self.load, name)
        found = getattr(self.factors, name)
        return lambda: found
