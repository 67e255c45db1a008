"""Grafting: the direction of the preconditioned gradient, with a length that ``lr`` acts on.

The length is a root mean square of :data:`RMS` over all numbers, about that of AdamW's step (Liu et
al., "Muon is Scalable for LLM Training", arXiv 2502.16982, Section 2.2), or that of the step of
another method. It is taken matrix by matrix, over weight and bias together. Source: Agarwal et al.,
"Disentangling Adaptive Gradient Methods from Learning Rates", arXiv 2002.11803; so does Distributed
Shampoo, arXiv 2309.06497, Section 3.

Momentum averages directions over steps. If all have one length, a batch that the model fits counts
there as much as one that it does not, and a model that fits its data becomes ever surer of it. So
the length is that of a running mean over the steps that momentum averages, with the same weights::

    v = (sum_k beta^k |D_{t-k}|^2) / (sum_k beta^k)         beta: the momentum
    D = 0.2 sqrt(numel) D / sqrt(v)

AdamW, Muon and SOAP average gradients first and give the average a length, which comes to the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from singd.capture.weight_matrix import WeightMatrix
from singd.ops.dtensor import local
from singd.placement import Holding, Kept, Placement
from singd.step.entries import GRAFT_NORM, state_key
from singd.step.fallback import adamw_directions
from singd.step.groups import counter_device

RMS = 0.2
"""Root mean square of a direction under ``"running"`` and ``"rms"``."""

ADAMW_NAMES = ("graft_exp_avg", "graft_exp_avg_sq")
"""What is stored of a parameter under ``"adamw"``, like it; a step counter beside."""

Averages = dict[Tensor, dict[str, Tensor]]
"""New moving averages, and counters, by parameter."""


def init(p: Tensor) -> dict[str, Tensor]:
    """AdamW's averages of a parameter before any step."""
    step = torch.zeros((), device=counter_device(p))
    return {"step": step, **{name: torch.zeros_like(p) for name in ADAMW_NAMES}}


def no_norms(like: Tensor) -> Tensor:
    """What is stored of the norms of a matrix before any step."""
    wide = torch.promote_types(like.dtype, torch.float32)
    return torch.zeros(2, dtype=wide, device=like.device)


def grafting(
    directions: Sequence[Kept],
    gradients: Sequence[Kept | None],
    holdings: Sequence[Holding],
    placement: Placement,
    graft: str,
    momentum: float,
    state: Mapping[Any, Mapping[str, Any]],
    adamw: Mapping[str, Any],
) -> tuple[Sequence[Tensor], Sequence[Tensor], Averages]:
    """What gives directions another length.

    Args:
        directions: Directions as far as they are held, those of equal matrices in one item; all of
            one data type, on one device; not changed.
        gradients: Their gradients likewise; ``"running"`` and ``"rms"`` need none.
        holdings: What is held; parameters without a gradient do not count.
        placement: Completes norms.
        graft: ``"running"``, a root mean square of :data:`RMS` over the steps that momentum
            averages; ``"rms"``, in every step; ``"sgd"``, the norm of the gradient; ``"adamw"``,
            that of AdamW's step at a rate of one without weight decay.
        momentum: Momentum of the parameters.
        state: State of the optimizer; not changed.
        adamw: Options of AdamW.

    Returns:
        Numbers that are finite where directions and their lengths are, what multiplies directions,
        in float32 at least, both ``[matrices]`` of each item, and new values for the state, by
        parameter.
    """
    averages: Averages = {}
    each = list(zip(holdings, directions, strict=True))
    norms = made = placement.complete_norms(torch.cat([h.norms(kept) for h, kept in each]))
    if graft in ("running", "rms"):
        lengths = torch.cat([_lengths(holding, norms) for holding in holdings])
        if graft == "running":
            matrices = [matrix for holding in holdings for matrix in holding.matrices]
            made, averages = _running(norms, momentum, matrices, state)
    else:
        found = []
        for (holding, kept), own in zip(each, gradients, strict=True):
            if graft == "sgd":
                assert own is not None, "held where they are read"
                found.append(holding.norms(own))
            else:
                steps, moved = _adamw(holding, kept, state, adamw)
                found.append(holding.norms_of(steps))
                averages |= moved
        lengths = placement.complete_norms(torch.cat(found))
    scale = lengths / made.clamp(min=torch.finfo(norms.dtype).tiny ** 0.5)
    sizes = [len(holding.matrices) for holding in holdings]
    return (norms + lengths).split(sizes), scale.split(sizes), averages


def _running(
    norms: Tensor,
    momentum: float,
    matrices: Sequence[WeightMatrix],
    state: Mapping[Any, Mapping[str, Any]],
) -> tuple[Tensor, Averages]:
    """Root mean squares of norms over the steps that momentum averages, ``[matrices]``.

    Stored of every matrix are the root of the sum of squares, and the sum of the weights.
    """
    keys = [state_key(matrix, GRAFT_NORM) for matrix in matrices]
    unset = no_norms(norms)
    before = [state[m.weight].get(k, unset) for m, k in zip(matrices, keys, strict=True)]
    squares, weights = torch.stack([t.to(norms) for t in before]).unbind(-1)
    squares = torch.hypot(squares * momentum**0.5, norms)
    weights = weights * momentum + 1
    averages: Averages = {}
    new = torch.stack([squares, weights], -1).unbind()
    for matrix, key, both in zip(matrices, keys, new, strict=True):
        averages.setdefault(matrix.weight, {})[key] = both
    return squares / weights.sqrt(), averages


def _adamw(
    holding: Holding,
    kept: Kept,
    state: Mapping[Any, Mapping[str, Any]],
    options: Mapping[str, Any],
) -> tuple[list[list[Tensor]], Averages]:
    """AdamW's steps, shaped like the slots; the direction where there is no gradient."""
    slots = [slot for own in holding.slots for slot in own]
    used = {s.parameter: s.parameter.grad for s in slots if s.parameter.grad is not None}
    averages: Averages = {p: _copied(p, state[p]) for p in used}
    moving = [{k.removeprefix("graft_"): t for k, t in own.items()} for own in averages.values()]
    grads = [local(grad).to(p.dtype) for p, grad in used.items()]
    steps = dict(zip(used, adamw_directions(grads, moving, options), strict=True))
    wanted = [
        [
            slot.of(steps[slot.parameter]) if slot.parameter in steps else t
            for slot, t in zip(own, parts, strict=True)
        ]
        for own, parts in zip(holding.slots, holding.parts(kept), strict=True)
    ]
    return wanted, averages


def _copied(p: Tensor, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """The averages of a parameter, as far as they are held, to be moved."""
    return {
        name: local(entry[name]).to(zero, copy=True) if name in entry else zero
        for name, zero in init(local(p)).items()
    }


def _lengths(holding: Holding, like: Tensor) -> Tensor:
    """Norms of directions whose numbers have the root mean square :data:`RMS`, ``[matrices]``."""
    counts = holding.counts()
    if len(set(counts)) == 1:  # no copy to the device
        return like.new_full((len(counts),), RMS * counts[0] ** 0.5)
    return like.new_tensor(counts).sqrt() * RMS
