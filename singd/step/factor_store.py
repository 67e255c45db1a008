"""Where factors are kept: equal matrices side by side, in the optimizer's state.

The tensors in ``optimizer.state[weight]`` are views of the batches here. They are the one home of
the factors: what is reset, reloaded or replaced there counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from singd.capture.weight_matrix import WeightMatrix
from singd.methods.base import Factors, Method, Products
from singd.ops import cuda_graph
from singd.placement import Demand, Placement
from singd.step.batch import Batch, Proposal
from singd.step.groups import Group
from singd.step.skipping import write_
from structured import Structure, StructuredMatrix

State = MutableMapping[Any, dict[str, Any]]


def state_key(matrix: WeightMatrix, name: str) -> str:
    """The key of a member of ``matrix`` in the state of its weight."""
    return f"{matrix.label}.{name}" if matrix.label else name


class FactorStore:
    """The factors of all matrices that are preconditioned.

    Args:
        method: Method that makes and updates them.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self.batches: list[Batch] = []
        self._batch_of: dict[WeightMatrix, Batch] = {}
        self._layouts: dict[WeightMatrix, tuple[Any, ...]] = {}
        self._templates: dict[WeightMatrix, Factors] = {}  # of those that other ranks have
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
                        _forget(matrix, state, self._batch_of.get(matrix))
            self._layouts = layouts
            self._arrange(groups, state, placement)
        for batch in self.batches:
            for matrix, views in zip(batch.matrices, batch.views, strict=True):
                if self._adopt(matrix, batch, views, state):
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
        return layouts

    def factors(self, matrix: WeightMatrix) -> Factors:
        """The factors of one matrix; where another rank has them, :meth:`template`."""
        batch = self._batch_of.get(matrix)
        return self._templates[matrix] if batch is None else batch.one[matrix]

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
        return factors

    def template(self, matrix: WeightMatrix, group: Mapping[str, Any]) -> Factors:
        """Factors of zeros that take no memory: of what shapes, data types and device they are."""
        weight, structures = matrix.weight, self.structures(matrix, group)
        factors: Factors = self.method.init(
            matrix.shape, structures, group, dtype=weight.dtype, device="meta"
        )
        return factors.map(
            lambda t: torch.zeros((), dtype=t.dtype, device=weight.device).expand(t.shape)
        )

    def demand(self, matrix: WeightMatrix, group: Group) -> Demand:
        """What the factors of a matrix need, in numbers and operations."""
        factors = self.template(matrix, group)
        sides = list(factors.members().values())[:2]
        counts = [sum(t.numel() for t in side.tensors()) for side in sides]
        P, item = math.prod(matrix.shape), matrix.weight.element_size()
        pairs = list(zip(counts, sides, strict=True))
        return Demand(
            numbers=P,
            statistics=sum(counts) * max(item, 4) if self.method.needs_activations else 0,
            itemsize=item,
            apply=sum(2.0 * count * P / max(side.n, 1) for count, side in pairs),
            update=sum(6.0 * count * side.n for count, side in pairs),
            interval=group["T"],
            needs_factors=self.method.needs_factors(factors, group),
            is_split=self.method.is_split,
            mixed_rows=self.method.mixed_rows(factors),
        )

    def products(self, batch: Batch) -> Products:
        """The products of the factors of a batch, made if they are not there."""
        if batch.products is None:
            batch.products = self.method.products(batch.factors, batch.group)
        return batch.products

    def write(self, proposals: Iterable[Proposal], unless: Tensor | None) -> None:
        """Take over new factors, except where the truth value ``unless`` is true."""
        for proposal in proposals:
            if not proposal.updated:
                continue
            batch = proposal.batch
            products = batch.products
            old, new = batch.factors.members(), proposal.factors.members()
            for name, member in new.items():
                if member is not old[name]:
                    _copy(old[name], member, unless)
            if products and (unless is not None or cuda_graph.is_capturing()):
                for name, product in proposal.products.items():  # other graphs read their places
                    _copy(products[name], product, unless)
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
                _drop(matrix, state, factors)
                continue
            _, dtype, device, group, _ = layout
            own = placement.place_of(matrix)
            key = (group, matrix.shape, self._structures[matrix], dtype, device, own)
            alike.setdefault(key, []).append(matrix)
        self.batches, self._batch_of = [], {}
        for matrices in alike.values():
            group = groups[matrices[0]]
            device = matrices[0].weight.device
            factors = self.fresh(matrices[0], group, len(matrices), device)
            batch = Batch(matrices, group, factors)
            self.batches.append(batch)
            self._batch_of |= dict.fromkeys(matrices, batch)
            for matrix in matrices:
                _drop_unknown(matrix, state, factors)

    def _adopt(
        self, matrix: WeightMatrix, batch: Batch, views: dict[str, list[Tensor]], state: State
    ) -> bool:
        """Make the state of a matrix and its place in the batch the same; whether that changed it.

        What the state holds is copied into the batch; where it holds nothing factors start afresh.
        """
        entry = state[matrix.weight]
        names = {name: state_key(matrix, name) for name in views}
        given: dict[str, Any] = {name: entry.get(key) for name, key in names.items()}
        if all(_are_same(given[name], views[name]) for name in views):
            return False
        missing = [name for name, value in given.items() if value is None]
        needed = [name for name in missing if not name.startswith("m_")]
        if needed and len(missing) < len(views):
            there = [name for name in views if name not in missing]
            raise ValueError(
                f"{matrix.name}: expected {', '.join(needed)} beside {', '.join(there)} in its "
                "state, got none"
            )
        if missing:
            fresh = self.fresh(matrix, batch.group, None, matrix.weight.device).members()
            given |= {name: list(fresh[name].tensors()) for name in missing}
        for name, value in given.items():
            _check_shapes(matrix, name, value, views[name])
        for name, value in given.items():
            for view, t in zip(views[name], value, strict=True):
                if view is not t:
                    view.copy_(t)
            entry[names[name]] = list(views[name])
        return True


def _are_same(value: Any, views: Sequence[Tensor]) -> bool:
    return (
        isinstance(value, list)
        and len(value) == len(views)
        and all(a is b for a, b in zip(value, views, strict=True))
    )


def _check_shapes(matrix: WeightMatrix, name: str, value: Any, views: Sequence[Tensor]) -> None:
    """Raise unless ``value`` is a list of tensors shaped like ``views``."""
    expected = [list(view.shape) for view in views]
    good = isinstance(value, list | tuple) and all(isinstance(t, Tensor) for t in value)
    got = [list(t.shape) for t in value] if good else type(value).__name__
    if got != expected:
        raise ValueError(f"{matrix.name}: expected {name} of shapes {expected}, got {got}")


def _forget(matrix: WeightMatrix, state: State, batch: Batch | None) -> None:
    """Drop the factors of a matrix: they were of another structure."""
    for name in batch.factors.members() if batch is not None else ():
        state.get(matrix.weight, {}).pop(state_key(matrix, name), None)


def _drop(matrix: WeightMatrix, state: State, factors: Factors) -> None:
    """Drop the factors of a matrix: another rank has them."""
    for name in factors.members():
        state[matrix.weight].pop(state_key(matrix, name), None)


def _drop_unknown(matrix: WeightMatrix, state: State, factors: Factors) -> None:
    """Drop members that a matrix no longer has: momenta that were switched off."""
    entry = state.get(matrix.weight, {})
    known = {state_key(matrix, name) for name in factors.members()}
    prefix = f"{matrix.label}." if matrix.label else ""
    for key in [k for k, v in entry.items() if isinstance(v, list) and k not in known]:
        if key.startswith(prefix) and ("." in key) == bool(prefix):
            del entry[key]


def _copy(target: StructuredMatrix, new: StructuredMatrix, unless: Tensor | None) -> None:
    """Write one member into the tensors of another."""
    for place, t in zip(target.tensors(), new.tensors(), strict=True):
        write_(place, t, unless)
