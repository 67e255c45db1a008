"""One attempt of a step: what comes before it and what is counted after it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from singd.capture.weight_matrix import WeightMatrix
from singd.methods.base import Options
from singd.ops import cuda_graph
from singd.step.entries import State, state_key
from singd.step.groups import Group, check_burn_in_is_over, keep_peak_lr, sees_scale
from singd.step.initial import make_state, wants_state
from singd.step.pipeline import Parts, Report, agree, pad_statistics, take_step


def attempt(
    parts: Parts,
    groups: Sequence[Group],
    state: State,
    scale: Tensor | None,
    descend: bool,
    observe: bool,
) -> Report | None:
    """Take a step, or skip it; it is counted in the groups. Options are those of :func:`take_step`.

    Returns:
        What the step did; ``None`` if only the state was made, for there was nothing else to do.
    """
    capture, skipping = parts.capture, parts.skipping
    if cuda_graph.is_capturing():
        check_burn_in_is_over(groups)
    else:
        skipping.settle()
    scale = _calling_scale() if scale is None else scale
    parts.placement.prepare()
    if not torch.compiler.is_compiling():
        parts.options.check(groups)
    parts.parameters.check(groups, state)
    parts.parameters.notice_new()
    if wants_state(parts, groups, state):
        _ensure_factors(parts, state)
        make_state(parts, state)
        return None
    agree(parts, state)
    _ensure_factors(parts, state)
    capture.loss_terms.check(_loss_averages(parts, groups), scale)
    statistics = pad_statistics(parts, capture.collect())
    report = take_step(parts, statistics, state, scale=scale, descend=descend, observe=observe)
    capture.end_step()
    stepped = [g for g in groups if any(d.group is g for d in report.directions)]
    peaks = [group["peak_lr"] for group in stepped]

    def undo() -> None:
        for group, peak in zip(stepped, peaks, strict=True):
            group["peak_lr"] = peak

    if report.found_inf is not None:
        skipping.defer(report.found_inf, undo)
    else:
        skipping.count(skipped=report.cause is not None)
    for group in groups:
        group["step"] += 1
    for group in stepped if report.cause is None else ():
        keep_peak_lr(group, report.found_inf)
    if parts.method.revises:
        revise(parts, groups, state)
    return report


def ensure(parts: Parts, groups: Sequence[Group], state: State) -> None:
    """Make factors where there are none, or where the state or the options changed."""
    parts.parameters.check(groups, state)
    _ensure_factors(parts, state)


def _ensure_factors(parts: Parts, state: State) -> None:
    """Make factors that are missing, and forget statistics that are of no use to them."""
    changed = parts.store.ensure(parts.parameters.preconditioned(), state, parts.placement)
    for matrix, is_restructured in changed.items():
        accumulator = parts.capture.accumulators.get(matrix)
        total = None if accumulator is None else accumulator.total
        if accumulator is None or total is None:
            continue
        if is_restructured or "whitened" in (total.input.kind, total.grad.kind):
            accumulator.discard(held=True)


def revise(parts: Parts, groups: Sequence[Group], state: State) -> None:
    """Let the method change options, and take over the factors that it goes on with."""
    placement, store = parts.placement, parts.store

    def agree(numbers: Sequence[float]) -> list[float]:
        like = next(iter(parts.parameters.group_of))
        *sums, count = placement.agree([*numbers, 1.0], like)
        return [number / count for number in sums]

    def sent(matrices: Mapping[WeightMatrix, Options]) -> Mapping[WeightMatrix, float]:
        return placement.foresee({m: store.demand(m, options) for m, options in matrices.items()})

    group_of = parts.parameters.preconditioned()
    before = {matrix: store.factors(matrix) for matrix in group_of}
    held = [(g, {m: f for m, f in before.items() if group_of[m] is g}) for g in groups]
    revised = parts.method.revise(held, agree, sent)
    for matrix, new in revised.items():
        entry = state[matrix.weight]
        for name in before[matrix].members():
            del entry[state_key(matrix, name)]
        for name, member in new.members().items():
            entry[state_key(matrix, name)] = list(member.tensors())
    if revised:
        _ensure_factors(parts, state)


def place(parts: Parts) -> None:
    """Choose where the factors of matrices that are new are worked on."""
    parts.store.place(parts.parameters.preconditioned(), parts.placement)


def _loss_averages(parts: Parts, groups: Sequence[Group]) -> set[str | None]:
    """What the groups say the loss is a mean over, where it matters; nothing if it is given.

    It does not matter to methods of gradients alone, which have no such option.
    """
    terms = parts.capture.count.terms
    if isinstance(terms, Tensor) or terms or not parts.method.needs_activations:
        return set()
    return {group["loss_average"] for group in groups if sees_scale(group)}


def _calling_scale() -> Tensor | None:
    """The scale of the GradScaler that is calling ``step``, if one is.

    It has freed the gradients of its scale by then, but not the statistics of the backward pass.
    An optimizer that it hands the scale (``_step_supports_amp_scaling``) is one whose gradients
    Lightning does not clip, and whose skipped steps accelerate does not see.
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name != "step":
            continue  # f_locals is a copy of them all
        caller = frame.f_locals.get("self")
        if isinstance(caller, torch.amp.GradScaler):
            return torch.tensor(caller.get_scale())
    return None
