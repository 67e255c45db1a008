"""The step: factors, directions and parameters, written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from singd.capture.capture import Capture
from singd.methods.base import Method
from singd.ops.dtensor import local
from singd.ops.profiling import scope
from singd.ops.reductions import all_finite
from singd.placement import Placement, Statistics
from singd.step.batch import Proposal
from singd.step.directions import (
    Direction,
    graft,
    move_parameters,
    precondition,
    reads_gradients,
    replace_gradients,
    scale_by_kl,
    write_averages,
)
from singd.step.entries import State
from singd.step.factor_store import FactorStore
from singd.step.factor_updates import Normalization, Residuals, update_factors
from singd.step.fallback import Fallback
from singd.step.groups import ChangedOptions, Group, is_due
from singd.step.parameters import Parameters
from singd.step.skipping import SkippedSteps, reading_waits


@dataclass
class Report:
    """What a step did, for whoever looks at it."""

    directions: list[Direction]
    norms: dict[str, dict[str, Tensor]]  # of gradients and directions by name, if asked for
    residuals: Residuals
    found_inf: Tensor | None  # truth value on the device, if the host does not know
    cause: str | None  # the name of what was not finite: then nothing was changed


@dataclass
class Parts:
    """The objects that take a step together."""

    capture: Capture
    parameters: Parameters
    store: FactorStore
    method: Method
    placement: Placement
    skipping: SkippedSteps
    fallback: Fallback
    max_skipped: int | None
    options: ChangedOptions = field(init=False)

    def __post_init__(self) -> None:
        self.options = ChangedOptions(self.method.check)


def take_step(
    parts: Parts,
    statistics: Statistics,
    state: State,
    *,
    scale: Tensor | None,
    descend: bool,
    observe: bool,
) -> Report:
    """Update factors that are due and move every parameter that has a gradient.

    Args:
        parts: The objects that take part.
        statistics: Sums of this rank.
        state: State of the optimizer.
        scale: Scale of the loss that gradients are free of and statistics are not, if any.
        descend: Move the parameters; else replace gradients by directions.
        observe: Report norms, and how far factors were from where they rest.
    """
    placement, store, parameters = parts.placement, parts.store, parts.parameters
    others = parameters.fallback()
    parameters.refuse_sparse(all_of_them=descend)
    residuals: Residuals = {}
    with scope("singd::factors"):
        reduced = placement.reduce(statistics)
        statistics = {matrix: one for matrix, one in reduced.items() if one.rows}
        placement.average_gradients(list(parameters.group_of))
        norm = Normalization(parts.capture.count.terms, scale, placement.size)
        wanted = residuals if observe else None
        proposed = update_factors(store, placement, statistics, norm, wanted)
    with scope("singd::directions"):
        groups = parameters.preconditioned()
        kept = observe or reads_gradients(groups.values())
        directions = precondition(proposed, parts.method, placement, groups, with_gradients=kept)
        averages = graft(directions, placement, state, parts.fallback.options)
        quadratic = scale_by_kl(directions, placement)
    norms = {k: v for d in directions for k, v in d.norms(placement).items()} if observe else {}
    report = Report(directions, norms, residuals, None, None)
    if parts.max_skipped is not None:
        made = _made(proposed, directions, quadratic, others)
        if may_defer(parts, others):
            report.found_inf = found_inf(made, placement)
        elif bool(found_inf(made, placement, order=2.0)):
            report.cause = find_cause(parts, statistics, proposed, directions)
            if report.cause is not None:
                return report
    unless = report.found_inf
    for d in directions:
        d.gradient = None  # a copy that nothing reads from here on
    store.write(proposed, unless)
    write_averages(averages, state, unless)
    if not descend:
        replace_gradients(directions, unless)
        return report
    with scope("singd::parameters"):
        move_parameters(directions, parameters, state, unless)
        for group, some in others:
            parts.fallback.step(some, group, state, unless)
    return report


# Whether all is finite ---------------------------------------------------------------------------


def _made(
    proposed: Iterable[Proposal],
    directions: Sequence[Direction],
    quadratic: Tensor | None,
    others: Iterable[tuple[Group, list[Tensor]]],
) -> list[Tensor]:
    """What shows that something is not finite in gradients, statistics or factors.

    What is not finite there is not finite in what is made of it, so only that is looked at.
    """
    made = [t for proposal in proposed if proposal.updated for t in proposal.stored.real()]
    made += [_values(local(p.grad)) for _, some in others for p in some if p.grad is not None]
    if quadratic is None:
        for d in directions:
            made += d.value if d.checked is None else [d.checked]
    else:
        made.append(quadratic)
    return [t for t in made if t.numel()]


def _values(grad: Tensor) -> Tensor:
    """The numbers of a gradient that another optimizer may step though it is sparse."""
    return grad._values() if grad.is_sparse else grad


def found_inf(made: list[Tensor], placement: Placement, order: float = torch.inf) -> Tensor:
    """Whether any number on any rank is not finite, a truth value on the device."""
    found = ~all_finite(made, order) if made else torch.zeros((), dtype=torch.bool)
    return found if placement.size == 1 else placement.complete(found.float()) > 0


def may_defer(parts: Parts, others: Iterable[tuple[Group, list[Tensor]]]) -> bool:
    """Whether the host may learn at the next step that this one was skipped.

    Not if the one before was, since an error may be due then, and not if nothing on the device
    can keep AdamW from moving.
    """
    if torch.compiler.is_compiling() or parts.skipping.in_row or parts.max_skipped == 1:
        return False
    fused = all(parts.fallback.is_fused(some) for _, some in others)
    return fused and reading_waits(parts.parameters.group_of)


def find_cause(
    parts: Parts,
    statistics: Statistics,
    proposed: Iterable[Proposal],
    directions: Iterable[Direction],
) -> str | None:
    """The first parameter whose gradient, statistics, factors or direction are not finite.

    All ranks find a cause if one of them does.
    """
    cause = _find_cause(parts, statistics, proposed, directions)
    count = parts.placement.complete(torch.tensor(float(cause is not None)))
    return cause or ("a number on another rank is not finite" if bool(count) else None)


def _find_cause(
    parts: Parts,
    statistics: Statistics,
    proposed: Iterable[Proposal],
    directions: Iterable[Direction],
) -> str | None:
    for p in parts.parameters.group_of:
        if p.grad is not None and not bool(_values(local(p.grad)).isfinite().all()):
            return f"{parts.parameters.name(p)}: its gradient is not finite"
    for matrix, one in statistics.items():
        sums = (*one.input.tensors(), *one.grad.tensors())
        if not all(bool(t.isfinite().all()) for t in sums):
            return f"{matrix.name}: its statistics are not finite"
    for proposal in proposed if any(p.updated for p in proposed) else ():
        for name, own in proposal.stored.tensors.items():
            for t in own:
                place = _not_finite(t)
                if place is not None:
                    return f"{proposal.batch.matrices[place].name}: its factor {name} is not finite"
    for d in directions:
        for matrix, ts in zip(d.matrices, d.parts, strict=True):
            if not all(bool(t.isfinite().all()) for t in ts):
                return f"{matrix.name}: its direction is not finite"
        place = None if d.checked is None else _not_finite(d.checked)
        if place is not None:
            return f"{d.matrices[place].name}: the norm of its direction is not finite"
    return None


def _not_finite(t: Tensor) -> int | None:
    """The first item of ``t [b, ...]`` that is not finite."""
    finite = t.isfinite().reshape(len(t), -1).all(1).tolist()
    return None if all(finite) else finite.index(False)


# Ranks -------------------------------------------------------------------------------------------


def agree(parts: Parts, state: State) -> None:
    """Make all ranks do the same: one may lack a gradient, or a reason to use AdamW.

    Matrices whose use was not understood on some rank are handed over to AdamW on all.
    """
    parameters, capture, placement = parts.parameters, parts.capture, parts.placement
    everything = list(parameters.group_of)
    matrices = list(parameters.matrices)
    if not parts.method.needs_activations:
        matrices = []  # nothing is seen of layers that could be refused
    verified = [capture.accumulators[matrix].verification for matrix in matrices]
    refused = [v.explained is False for v in verified]
    unseen = capture.unseen(matrices)
    if placement.has_others:
        used = [p.grad is not None for p in everything]
        placement.check_same(
            lambda: [f"{parameters.name(p)} {list(p.shape)}" for p in everything],
            everything[0].device,
        )
        given = [*used, *refused, *unseen, capture.count.terms]
        numbers = placement.agree(given, everything[0])
        capture.count.end_step(numbers.pop())
        for p, count in zip(everything, numbers, strict=False):
            if count and p.grad is None and isinstance(p, nn.Parameter):
                p.grad = torch.zeros_like(p)
        numbers = numbers[len(everything) :]
        refused, unseen = [bool(n) for n in numbers[: len(matrices)]], numbers[len(matrices) :]
    elsewhere = "what its layer is called with on another rank does not explain the gradient"
    reasons = {
        matrix: v.reason or elsewhere
        for matrix, v, refuse in zip(matrices, verified, refused, strict=True)
        if refuse
    }
    if reasons:
        parameters.hand_over(reasons, state)
    told = {matrix for matrix, number in zip(matrices, unseen, strict=True) if number > 0}
    if told:
        capture.notice_unseen(matrix for matrix in parameters.preconditioned() if matrix in told)


def pad_statistics(parts: Parts, statistics: Statistics) -> Statistics:
    """Statistics of all matrices that are due: those of no rows where this rank saw none."""
    if parts.placement.size == 1 or not parts.method.needs_activations:
        return statistics
    return {
        matrix: statistics.get(matrix) or parts.capture.empty(matrix)
        for matrix, group in parts.parameters.preconditioned().items()
        if is_due(group)
    }
