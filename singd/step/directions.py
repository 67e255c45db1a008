"""From gradients to directions, their length, and the parameters that move along them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from singd.capture.weight_matrix import WeightMatrix
from singd.methods.base import Method
from singd.methods.options import graft_of
from singd.ops.dtensor import is_distributed, local
from singd.ops.grouping import grouped
from singd.ops.momentum_step import momentum_step_
from singd.ops.reductions import inner_product, total
from singd.ops.stochastic_rounding import Rounding
from singd.placement import Holding, Kept, Placement, Slot, Work
from singd.step.batch import Proposal
from singd.step.entries import State, is_count
from singd.step.grafting import Averages, grafting
from singd.step.groups import Group, peak_lr
from singd.step.parameters import Parameters
from singd.step.skipping import write_, write_all_
from singd.update import kl_scale


@dataclass
class Direction:
    """Equal matrices with a gradient, and what their parameters move along.

    Gradients and directions are what this rank holds of them, as :class:`~singd.placement.Holding`
    says. Gradients are there if :func:`reads_gradients`. Values are given up, and empty, where
    their parts, parameter by parameter, are no views of them.
    """

    matrices: list[WeightMatrix]
    group: Group
    holding: Holding
    gradient: Kept | None
    value: Kept
    parts: list[list[Tensor]] = field(default_factory=list)  # of the value, of every matrix
    scale: Tensor | None = None  # what the step multiplies directions by
    checked: Tensor | None = None  # of grafting: finite where directions and their lengths are

    def norms(self, placement: Placement) -> dict[str, dict[str, Tensor]]:
        """Frobenius norms of gradients and directions, by the key of the matrix."""
        norms = {"direction_norm": self.holding.norms_of(self.parts)}
        if self.gradient is not None:
            norms["gradient_norm"] = self.holding.norms(self.gradient)
        found = {name: placement.complete_norms(own) for name, own in norms.items()}
        return {
            matrix.key: {name: values[i] for name, values in found.items()}
            for i, matrix in enumerate(self.matrices)
        }

    def moves(self) -> Iterator[tuple[Slot, Tensor]]:
        """Every parameter that has a gradient, with its part of the directions."""
        for slots, parts in zip(self.holding.slots, self.parts, strict=True):
            for slot, part in zip(slots, parts, strict=True):
                if slot.parameter.grad is not None:
                    yield slot, part


def reads_gradients(groups: Iterable[Group]) -> bool:
    """Whether the length of a direction depends on its gradient."""
    return any(g["kl_clip"] is not None or graft_of(g) in ("sgd", "adamw") for g in groups)


def precondition(
    proposed: Sequence[Proposal],
    method: Method,
    placement: Placement,
    groups: Mapping[WeightMatrix, Group],
    *,
    with_gradients: bool,
) -> list[Direction]:
    """The directions of all matrices that have a gradient, which may be held beside them.

    The factors are those that this rank has; all that are preconditioned are in ``groups``.
    """
    works = []
    for proposal in proposed:
        some = [matrix for matrix in proposal.batch.matrices if matrix.has_gradient]
        if some:
            names = ("precondition", "apply_input", "apply_grad", "apply_rows", "apply_apart")
            made = [functools.partial(_apply, getattr(method, n), proposal, some) for n in names]
            works.append(Work(some, _is_apart(method, proposal), *made))
    moving = [matrix for matrix in groups if matrix.has_gradient]
    alike = grouped(moving, lambda matrix: id(groups[matrix]))
    return [
        Direction(m.matrices, groups[m.matrices[0]], m.holding, m.gradient, m.direction)
        for m in placement.directions(works, alike, with_gradients=with_gradients)
    ]


def _is_apart(method: Method, proposal: Proposal) -> bool:
    """Whether directions are best made of weights and biases apart."""
    if proposal.batch.matrices[0].bias is None or not method.speaks_for("is_apart", "apply_apart"):
        return False
    return method.is_apart(proposal.stored.like, proposal.products)


def _apply(
    function: Callable[..., Any],
    proposal: Proposal,
    some: list[WeightMatrix],
    *G: Tensor,
    **rows: slice,
) -> Any:
    """A function of the method, of the factors of some matrices of a batch and of gradients."""
    stored, products = proposal.batch.select(some, proposal.stored, proposal.products)
    return function(stored.factors(), *G, products, *rows.values())


def graft(
    directions: Sequence[Direction], placement: Placement, state: State, adamw: Mapping[str, Any]
) -> Averages:
    """Give directions another length, where the group asks for it, and all of them their parts.

    Directions are changed; the state is not.

    Returns:
        New values for the state, by parameter.
    """
    averages: Averages = {}
    for some in grouped(directions, lambda d: (id(d.group), d.value[0].device, d.value[0].dtype)):
        wanted = graft_of(some[0].group)
        if wanted is None:
            for d in some:
                d.parts = d.holding.parts(d.value)
            continue
        checked, scales, own = grafting(
            [d.value for d in some],
            [d.gradient for d in some],
            [d.holding for d in some],
            placement,
            wanted,
            some[0].group["momentum"],
            state,
            adamw,
        )
        averages |= own
        for d, d.checked, scale in zip(some, checked, scales, strict=True):
            if d.gradient is None:  # or else copies of both would stand beside it
                d.parts, d.value = d.holding.scaled(d.value, scale), []
            else:
                d.holding.scale_(d.value, scale)
                d.parts = d.holding.parts(d.value)
    return averages


def scale_by_kl(directions: Sequence[Direction], placement: Placement) -> Tensor | None:
    """Bound the step of every group that has a ``kl_clip``, all of them together.

    Returns:
        The sum ``q`` that bounds go by, if it saw all directions.
    """
    clipped = [d for d in directions if d.group["kl_clip"] is not None]
    bounded = grouped(clipped, lambda d: id(d.group))
    if not bounded:
        return None
    sums = []
    for same in bounded:
        products = [
            inner_product(x, y)
            for d in same
            if d.gradient is not None
            for x, y in zip(d.holding.counted(d.value), d.holding.counted(d.gradient), strict=True)
        ]
        sums.append(peak_lr(same[0].group) ** 2 * total(products))
    q = placement.complete(total(sums))
    for same in bounded:
        scale = kl_scale(same[0].group["kl_clip"], q)
        for d in same:
            d.scale = scale
    return q if all(d.scale is not None for d in directions) else None


# What is written ---------------------------------------------------------------------------------


def write_averages(averages: Averages, state: State, unless: Tensor | None) -> None:
    """Keep the moving averages of grafting, except where ``unless`` is true."""
    targets, values = [], []
    for p, own in averages.items():
        for name, new in own.items():
            old = state[p].get(name)
            if old is None:
                target = _like(p, name, new)
            else:
                target = old.to(new) if is_count(name) else old.to(new.device)
            state[p][name] = target
            targets.append(local(target))
            values.append(new)
    write_all_(targets, values, unless)


def replace_gradients(directions: Sequence[Direction], unless: Tensor | None) -> None:
    """Put scaled directions into ``.grad``, except where ``unless`` is true."""
    for d in directions:
        for slot, value in d.moves():
            if slot.parameter.grad is not None:
                value = value if d.scale is None else value * d.scale.to(value)
                write_(slot.of(slot.parameter.grad), value, unless)


def move_parameters(
    directions: Sequence[Direction],
    parameters: Parameters,
    state: State,
    unless: Tensor | None,
) -> None:
    """Move every parameter along its direction, except where ``unless`` is true.

    The group of a bias need not be its weight's.
    """

    def kind(move: tuple[Slot, Tensor, Tensor | None]) -> tuple[Any, ...]:
        p, scale = move[0].parameter, move[2]
        return id(parameters.group_of[p]), id(scale), p.device, p.dtype

    every = [(slot, value, d.scale) for d in directions for slot, value in d.moves()]
    for moves in grouped(every, kind):
        slots, values, scales = zip(*moves, strict=True)
        group = parameters.group_of[slots[0].parameter]
        buffers = []
        if group["momentum"]:
            buffers = [slot.of(_buffer(slot.parameter, state)) for slot in slots]
        momentum_step_(
            [slot.of(slot.parameter) for slot in slots],
            values,
            buffers,
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled_weight_decay"],
            rounding=Rounding(group["seed"], group["step"]),
            names=[f"{parameters.name(s.parameter)} {s.matrix.label}" for s in slots],
            indices=[slot.indices for slot in slots],
            scale=scales[0],
            unless=unless,
        )


def _like(p: Tensor, name: str, new: Tensor) -> Tensor:
    """Zeros for what is stored of ``p``, or for a counter of it."""
    return torch.zeros_like(p if is_distributed(p) and not is_count(name) else new)


def _buffer(p: Tensor, state: State) -> Tensor:
    """The momentum of a parameter."""
    entry = state[p]
    buffer: Tensor | None = entry.get("momentum_buffer")
    if buffer is None or buffer.dtype != p.dtype:  # another was put there by somebody else
        buffer = torch.zeros_like(p) if buffer is None else buffer.to(p.dtype)
        entry["momentum_buffer"] = buffer
    return buffer
