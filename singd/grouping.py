"""Grouping: units of equal shape and options are one batched object, stepped by one product."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from singd import cuda_graph
from singd.capture import Unit
from singd.verdict import write_
from structured import StructuredMatrix

Members = dict[str, StructuredMatrix]
Products = dict[str, Any]  # symmetric operators ``K K^T``, stored as members are


class Bucket:
    """Units side by side along a first batch dimension.

    The factors are stored batched; the state of every weight, and ``unit.members``, are views.

    Args:
        units: Equal in shape, structures, options, dtype and device.
        fresh: The factors before any update, ``[units, ..., n, n]``.
        state: The optimizer's state, keyed to the parameter. What it holds already is taken over.
    """

    def __init__(
        self, units: Sequence[Unit], fresh: Members, state: Mapping[Tensor, dict[str, Any]]
    ) -> None:
        self.units, self.members = list(units), fresh
        self.products: Products = {}  # worth keeping between two updates, not part of the state
        self.indices: dict[tuple[int, ...], Tensor] = {}
        for index, unit in enumerate(self.units):
            own, unit.bucket = state[unit.weight], self
            for name, member in fresh.items():
                views = [t[index] for t in member.tensors()]
                if name in own:
                    for view, kept in zip(views, own[name], strict=True):
                        view.copy_(kept)
                own[name] = views
                unit.members[name] = member.with_tensors(views)

    def replaced(
        self, units: Sequence[Unit], new: Members, rounded: Callable[..., Tensor]
    ) -> Members:
        """The factors once those of some units are ``new``, ``rounded(tensor, dtype)``."""
        changed: Members = {}
        for name, member in new.items():
            before = self.members[name]
            tensors = [
                rounded(t, kept.dtype)
                for t, kept in zip(member.tensors(), before.tensors(), strict=True)
            ]
            if len(units) < len(self.units):
                index = self.index(units)
                tensors = [
                    kept.index_copy(0, index, t)
                    for t, kept in zip(tensors, before.tensors(), strict=True)
                ]
            changed[name] = before.with_tensors(tensors)
        return {**self.members, **changed}

    def store(self, members: Members, products: Products, ok: Tensor | None = None) -> None:
        """Take over new factors and their products, unless ``ok`` says no on the device."""
        for name, member in members.items():
            if member is not self.members[name]:
                copy_(self.members[name], member, ok)
        if self.products and (ok is not None or cuda_graph.capturing()):
            for name, product in products.items():  # other graphs read them at their place
                copy_(self.products[name], product, ok)
        elif ok is None:  # else they are made of the factors that are kept, at the next step
            self.products = products

    def product(self, unit: Unit, name: str, part: int) -> StructuredMatrix:
        """A product of one unit, of one part of its layer."""
        own: StructuredMatrix = self.products[name].map(lambda t: t[self.units.index(unit)])
        return own if unit.layer.parts == 1 else own.map(lambda t: t[part])

    def select(self, units: Sequence[Unit], *members: dict[str, Any]) -> tuple[dict[str, Any], ...]:
        """What belongs to some of the units; copies, unless it is all of them."""
        if len(units) == len(self.units):
            return members
        index = self.index(units)
        return tuple(
            {name: member.map(lambda t: t[index]) for name, member in each.items()}
            for each in members
        )

    def index(self, units: Sequence[Unit]) -> Tensor:
        """The places of some of the units; made once, since that waits for the device."""
        places = tuple(self.units.index(unit) for unit in units)
        if places not in self.indices:
            self.indices[places] = torch.tensor(places, device=self.units[0].weight.device)
        return self.indices[places]


def buckets(
    units: Iterable[Unit],
    fresh: Callable[[Unit, int], Members],
    state: Mapping[Tensor, dict[str, Any]],
) -> list[Bucket]:
    """Sort units into buckets; ``fresh(unit, count)`` makes the factors of ``count`` such units."""
    sorted_: dict[Any, list[Unit]] = {}
    for unit in units:
        weight = unit.weight
        key = (id(unit.group), unit.shape, unit.structures, weight.dtype, weight.device)
        sorted_.setdefault(key, []).append(unit)
    return [Bucket(same, fresh(same[0], len(same)), state) for same in sorted_.values()]


def copy_(kept: StructuredMatrix, new: StructuredMatrix, ok: Tensor | None = None) -> None:
    """Write one member into the tensors of another, unless ``ok`` says no."""
    for place, t in zip(kept.tensors(), new.tensors(), strict=True):
        write_(place, t, ok)


class Columns(NamedTuple):
    """Some columns of the weight matrices of units: those of weights, of biases, or of both."""

    units: Sequence[Unit]
    weights: bool = True
    biases: bool = True

    def gradients(self) -> Tensor:
        """All side by side, ``[units, ..., d_out, columns]``; zero where there is none.

        May share memory with a gradient.
        """
        *rows, d_out, d_in = self.units[0].shape
        weights, biases = [], []
        for unit in self.units:
            if self.weights:
                grad = unit.weight.grad
                grad = torch.zeros_like(unit.weight) if grad is None else grad
                weights.append(unit.matrix(grad))
            if self.biases and unit.bias is not None:
                grad = unit.bias.grad
                grad = torch.zeros_like(unit.bias) if grad is None else grad
                biases.append(grad.reshape(*rows, d_out, 1))
        if not weights or not biases:
            alone = weights or biases
            return alone[0][None] if len(alone) == 1 else torch.stack(alone)
        out = weights[0].new_empty((len(weights), *rows, d_out, d_in))
        slots = (*out[..., :-1].unbind(), *out[..., -1:].unbind())
        torch._foreach_copy_(slots, [*weights, *biases])
        return out

    def moves(self, matrices: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """Every parameter that has a gradient with its part of such matrices."""
        moves: list[tuple[nn.Parameter, Tensor]] = []
        for unit, matrix in zip(self.units, matrices.unbind(), strict=True):
            if self.weights and self.biases:
                moves += zip(unit.parameters, unit.split(matrix), strict=True)
            elif self.weights:
                moves.append((unit.weight, unit.like_weight(matrix)))
            elif unit.bias is not None:
                moves.append((unit.bias, matrix.reshape(unit.bias.shape)))
        return [move for move in moves if move[0].grad is not None]
