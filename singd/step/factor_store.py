"""Where factors are kept: equal matrices side by side, in the optimizer's state.

The tensors in ``optimizer.state[weight]`` are views of the batches here. They are the one home of
the factors: what is reset, reloaded or replaced there counts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from singd.capture.statistics import Side
from singd.capture.weight_matrix import WeightMatrix
from singd.methods.base import Factors, Method, Products
from singd.ops import cuda_graph
from singd.ops.parts import Part
from singd.ops.storage import Form, form_of, recode
from singd.placement import Demand, Placement
from singd.step.batch import Batch, Encoded, Proposal, encode
from singd.step.demand import cut, demand_of, indices_of
from singd.step.entries import State, are_same, drop, drop_unknown, recognized
from singd.step.groups import Group
from singd.step.skipping import write_
from structured import Structure


class FactorStore:
    """The factors of all matrices, which a method makes and updates."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.batches: list[Batch] = []
        self._batch_of: dict[WeightMatrix, Batch] = {}
        self._layouts: dict[WeightMatrix, tuple[Any, ...]] = {}
        self._templates: dict[WeightMatrix, Factors] = {}  # of those that other ranks have
        self._parts: dict[WeightMatrix, Part] = {}  # of those that ranks share
        self._structures: dict[WeightMatrix, tuple[Structure, ...]] = {}

    def ensure(
        self, groups: Mapping[WeightMatrix, Group], state: State, placement: Placement
    ) -> dict[WeightMatrix, bool]:
        """Make factors where there are none, and take over what the state holds instead of ours.

        Args:
            groups: The matrices that are preconditioned, each with the group of its weight.
            state: State of the optimizer.
            placement: Says which factors this rank has.

        Returns:
            Matrices whose factors changed, and whether their structures did.

        Raises:
            ValueError: If the state of a matrix is incomplete or of another shape.
        """
        changed: dict[WeightMatrix, bool] = {}
        layouts = self.place(groups, placement)
        if layouts != self._layouts:
            for matrix in groups:
                before = self._structures.get(matrix)
                if layouts[matrix] != self._layouts.get(matrix):
                    self._structures[matrix] = self.structures(matrix, groups[matrix])
                    if before not in (None, self._structures[matrix]):
                        changed[matrix] = True
                        batch = self._batch_of.get(matrix)
                        drop(matrix, state, () if batch is None else batch.stored.tensors)
            self._layouts = layouts
            self._arrange(groups, state, placement)
        for batch in self.batches:
            for matrix, own in batch.one.items():
                if self._adopt(matrix, batch, own, state):
                    batch.products = None
                    changed.setdefault(matrix, False)
        return changed

    def place(
        self, groups: Mapping[WeightMatrix, Group], placement: Placement
    ) -> dict[WeightMatrix, tuple[Any, ...]]:
        """Choose where the factors of new matrices are worked on.

        Returns:
            What the factors of each matrix depend on besides statistics.
        """
        choices: dict[int, Any] = {}
        for group in groups.values():
            if id(group) not in choices:
                choices[id(group)] = self.method.layout(group)
        layouts = {m: self._layout(m, g, choices[id(g)]) for m, g in groups.items()}
        placement.place(layouts, lambda matrix: self.demand(matrix, groups[matrix]))
        self._parts = {m: part for m in groups if (part := placement.part_of(m)) is not None}
        return layouts

    def demand(self, matrix: WeightMatrix, group: Mapping[str, Any]) -> Demand:
        """What the factors of a matrix need, by the options of its group."""
        return demand_of(self.method, matrix, self.template(matrix, group), group)

    def factors(self, matrix: WeightMatrix) -> Factors:
        """The factors of one matrix; where another rank has them, :meth:`template`."""
        batch = self._batch_of.get(matrix)
        if batch is None:
            return self._templates[matrix]
        return batch.one[matrix].factors()

    def summarizing(self, matrix: WeightMatrix, group: Group, side: Side) -> Factors:
        """The factors that statistics are made with: their numbers where a method needs them."""
        part = self._parts.get(matrix)
        if part is not None and part.is_scattered and part.side == side:
            return self._templates[matrix]
        batch = self._batch_of.get(matrix)
        if batch is None or batch.stored.is_plain:
            return self.factors(matrix)
        if matrix not in self._templates:
            self._templates[matrix] = self.template(matrix, group)
        like = self._templates[matrix]
        return self.factors(matrix) if self.method.needs_factors(like, group) else like

    def holds(self, matrix: WeightMatrix, group: Group) -> bool:
        """Whether there are factors of ``matrix``, made for its weight and options as they are."""
        layout = self._layout(matrix, group, self.method.layout(group))
        return self._layouts.get(matrix) == layout

    def structures(self, matrix: WeightMatrix, group: Mapping[str, Any]) -> tuple[Structure, ...]:
        """The structures of the factors of a matrix."""
        shape, fixed = matrix.layer.shape(matrix.module), matrix.layer.input_structure
        return self.method.structures(matrix.name, shape, fixed, group)

    def fresh(
        self, matrix: WeightMatrix, group: Group, count: int | None, device: torch.device | str
    ) -> Factors:
        """Factors before any update.

        Args:
            matrix: Matrix that they are of.
            group: Group of its weight.
            count: Number of equal matrices side by side; ``None`` for one without that dimension.
            device: Device of the factors.
        """
        factors: Factors = self.method.init(
            matrix.shape,
            self._structures.get(matrix) or self.structures(matrix, group),
            group,
            batch_shape=() if count is None else (count,),
            dtype=matrix.weight.dtype,
            device=device,
        )
        part = self._parts.get(matrix)
        return factors if part is None else cut(factors, part, self.method).map(torch.clone)

    def encoded(self, factors: Factors, group: Mapping[str, Any], count: int | None) -> Encoded:
        """Factors as they are stored, rounded to nearest.

        Args:
            factors: Factors; on the meta device for shapes alone.
            group: Group of their weights.
            count: Number of equal matrices side by side; ``None`` for one without that dimension.
        """
        names = self.method.storage(factors, group)
        forms: dict[str, list[Form]] = {}
        if count is None:
            factors = factors.map(lambda t: t[None])
        for name, member in factors.members().items():
            forms[name] = [form_of(names.get(name), t[0], member.n) for t in member.tensors()]
        stored = Encoded(factors, forms, encode(factors, forms, keys=[""] * (count or 1)))
        return stored.map(lambda t: t[0]) if count is None else stored

    def template(self, matrix: WeightMatrix, group: Mapping[str, Any]) -> Factors:
        """Factors of zeros that take no memory: of what shapes, data types and device they are."""
        return self._blank(matrix, group).map(functools.partial(_zeros, matrix.weight.device))

    def stored_template(
        self, matrix: WeightMatrix, group: Mapping[str, Any]
    ) -> dict[str, list[Tensor]]:
        """What is stored of a matrix, by member, as zeros that take no memory."""
        stored = self.encoded(self._blank(matrix, group), group, None).tensors
        return {n: [_zeros(matrix.weight.device, t) for t in own] for n, own in stored.items()}

    def _blank(self, matrix: WeightMatrix, group: Mapping[str, Any]) -> Factors:
        weight, structures = matrix.weight, self.structures(matrix, group)
        return self.method.init(matrix.shape, structures, group, dtype=weight.dtype, device="meta")

    def products(self, batch: Batch) -> Products:
        """The products of the factors of a batch, made if they are not there."""
        if batch.products is None:
            batch.products = self.products_of(batch.stored, batch.group)
        return batch.products

    def products_of(self, stored: Encoded, group: Group) -> Products:
        """The products of some factors; none where no member is stored as it is."""
        return self.method.products(stored.factors(), group) if stored.plain else {}

    def write(self, proposals: Iterable[Proposal], unless: Tensor | None) -> None:
        """Take over new factors, except where the truth value ``unless`` is true."""
        for proposal in proposals:
            if not proposal.updated:
                continue
            batch = proposal.batch
            products = batch.products
            for name, own in proposal.stored.tensors.items():
                for place, t in zip(batch.stored.tensors[name], own, strict=True):
                    if t is not place:
                        write_(place, t, unless)
            if products and (unless is not None or cuda_graph.is_capturing()):
                for name, product in proposal.products.items():  # other graphs read their places
                    for place, t in zip(products[name].tensors(), product.tensors(), strict=True):
                        write_(place, t, unless)
                batch.products = products
            else:
                batch.products = proposal.products if unless is None else None

    # The state ----------------------------------------------------------------------------------

    def _layout(self, matrix: WeightMatrix, group: Group, choices: Any) -> tuple[Any, ...]:
        """What the factors of a matrix depend on besides statistics."""
        weight = matrix.weight
        return weight.shape, weight.dtype, weight.device, id(group), choices

    def _arrange(
        self, groups: Mapping[WeightMatrix, Group], state: State, placement: Placement
    ) -> None:
        """Sort equal matrices into batches; factors that are there are copied into them."""
        alike: dict[Any, list[WeightMatrix]] = {}
        self._templates = {}
        for matrix, layout in self._layouts.items():
            if not placement.holds(matrix):
                factors = self._templates[matrix] = self.template(matrix, groups[matrix])
                drop(matrix, state, factors.members())
                continue
            _, dtype, device, group, _ = layout
            own = placement.place_of(matrix)
            part = self._parts.get(matrix)
            rows = None if part is None else (part.side, part.rows.start, part.rows.stop)
            if part is not None:
                self._templates[matrix] = self.template(matrix, groups[matrix])
            shape = matrix.shape, matrix.bias is None  # which counts as one more input
            key = (group, shape, self._structures[matrix], dtype, device, own, rows)
            alike.setdefault(key, []).append(matrix)
        self.batches, self._batch_of = [], {}
        for matrices in alike.values():
            group = groups[matrices[0]]
            device = matrices[0].weight.device
            factors = self.fresh(matrices[0], group, len(matrices), device)
            stored = self.encoded(factors, group, len(matrices))
            part = self._parts.get(matrices[0])
            held = indices_of(self._templates[matrices[0]], part, self.method) if part else {}
            batch = Batch(matrices, group, stored, held)
            self.batches.append(batch)
            self._batch_of |= dict.fromkeys(matrices, batch)
            for matrix in matrices:
                drop_unknown(matrix, state, batch.stored.tensors)

    def _adopt(self, matrix: WeightMatrix, batch: Batch, own: Encoded, state: State) -> bool:
        """Make the state of a matrix and its place in the batch the same; whether that changed it.

        What the state holds is copied into the batch, in whatever form it is; where it holds
        nothing factors start afresh.
        """
        entry = state[matrix.weight]
        views = own.tensors
        names = batch.keys[matrix]
        if all(are_same(entry.get(key), views[name]) for name, key in names.items()):
            return False
        given: dict[str, Any] = {name: entry.get(key) for name, key in names.items()}
        missing = [name for name, value in given.items() if value is None]
        needed = [name for name in missing if not name.startswith("m_")]
        if needed and len(missing) < len(views):
            there = [name for name in views if name not in missing]
            raise ValueError(
                f"{matrix.name}: expected {', '.join(needed)} beside {', '.join(there)} in its "
                "state, got none"
            )
        if missing:
            fresh = self.fresh(matrix, batch.group, None, matrix.weight.device)
            stored = self.encoded(fresh, batch.group, None).tensors
            given |= {name: list(stored[name]) for name in missing}
        for name, value in given.items():
            forms = recognized(matrix, name, value, batch.shapes[name])
            given[name] = recode(value, forms, own.forms[name])
        for name, value in given.items():
            for view, t in zip(views[name], value, strict=True):
                if view is not t:
                    view.copy_(t)
            entry[names[name]] = list(views[name])
        return True


def _zeros(device: torch.device, like: Tensor) -> Tensor:
    """Zeros of a shape and data type that take no memory."""
    return torch.zeros((), dtype=like.dtype, device=device).expand(like.shape)
