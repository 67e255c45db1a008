"""Grafting: the direction of the preconditioned gradient, with a length that ``lr`` acts on.

The length is a root mean square of :data:`RMS` over all numbers, about that of AdamW's step (Liu et
al., "Muon is Scalable for LLM Training", arXiv 2502.16982, Section 2.2), or that of the step of
another method. It is taken matrix by matrix, over weight and bias together. Source: Agarwal et al.,
"Disentangling Adaptive Gradient Methods from Learning Rates", arXiv 2002.11803; so does Distributed
Shampoo, arXiv 2309.06497, Section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from singd.capture.weight_matrix import WeightMatrix
from singd.step.fallback import adamw_directions
from singd.step.groups import counter_device

RMS = 0.2
"""Root mean square of a direction under ``"rms"``."""

Averages = dict[Tensor, dict[str, Tensor]]
"""New moving averages of gradients, and counters, by parameter."""


def state_names(graft: str | None) -> tuple[str, ...]:
    """What is stored of a parameter, like it; a step counter beside."""
    return ("graft_exp_avg", "graft_exp_avg_sq") if graft == "adamw" else ()


def init(p: Tensor) -> dict[str, Tensor]:
    """AdamW's averages of a parameter before any step."""
    step = torch.zeros((), device=counter_device(p))
    return {"step": step, **{name: torch.zeros_like(p) for name in state_names("adamw")}}


def graft_(
    directions: Tensor,
    gradients: Tensor,
    matrices: Sequence[WeightMatrix],
    graft: str,
    state: Mapping[Any, Mapping[str, Any]],
    adamw: Mapping[str, Any],
) -> Averages:
    """Give directions another length, in place.

    Args:
        directions: Directions of equal matrices, ``[matrices, ..., d_out, d_in]``.
        gradients: Their gradients likewise.
        matrices: The matrices; parameters without a gradient do not count.
        graft: ``"rms"``, a root mean square of :data:`RMS`; ``"sgd"``, the norm of the gradient;
            ``"adamw"``, that of AdamW's step at a rate of one without weight decay.
        state: State of the optimizer; not changed.
        adamw: Options of AdamW.

    Returns:
        New values for the state, by parameter.
    """
    averages: Averages = {}
    wanted = [matrix.split(g) for matrix, g in zip(matrices, gradients, strict=True)]
    if graft == "adamw":
        used = {p: p.grad for m in matrices for p in m.parameters if p.grad is not None}
        averages = {p: _copied(p, state[p]) for p in used}
        moving = [_without_prefix(average) for average in averages.values()]
        grads = [grad.to(p.dtype) for p, grad in used.items()]
        steps = dict(zip(used, adamw_directions(grads, moving, adamw), strict=True))
        wanted = [
            [
                m.part(steps[p]) if p in steps else t
                for p, t in zip(m.parameters, parts, strict=True)
            ]
            for m, parts in zip(matrices, wanted, strict=True)
        ]
    parts = [matrix.split(d) for matrix, d in zip(matrices, directions, strict=True)]
    norms = _norms(parts, matrices)
    lengths = _lengths(matrices, norms) if graft == "rms" else _norms(wanted, matrices)
    scale = lengths / norms.clamp(min=torch.finfo(norms.dtype).tiny ** 0.5)
    directions.mul_(scale.to(directions.dtype).view(-1, *[1] * (directions.ndim - 1)))
    return averages


def _copied(p: Tensor, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """The averages of a parameter, to be moved."""
    return {
        name: entry[name].to(zero, copy=True) if name in entry else zero
        for name, zero in init(p).items()
    }


def _without_prefix(average: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("graft_"): t for name, t in average.items()}


def _lengths(matrices: Sequence[WeightMatrix], like: Tensor) -> Tensor:
    """Norms of directions whose numbers have the root mean square :data:`RMS`, ``[matrices]``."""
    counts = [
        sum(matrix.part(p).numel() for p in matrix.parameters if p.grad is not None)
        for matrix in matrices
    ]
    if len(set(counts)) == 1:  # no copy to the device
        return torch.full_like(like, RMS * counts[0] ** 0.5)
    return like.new_tensor(counts).sqrt() * RMS


def _norms(parts: Sequence[Sequence[Tensor]], matrices: Sequence[WeightMatrix]) -> Tensor:
    """Joint norms of weight and bias where they count, ``[matrices]``, in float32 at least."""
    tensors = [
        t if p.grad is not None else t.new_zeros(1)
        for matrix, both in zip(matrices, parts, strict=True)
        for p, t in zip(matrix.parameters, both, strict=True)
    ]
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    norms = torch.stack(torch._foreach_norm([t.to(wide) for t in tensors]))
    return torch.linalg.vector_norm(norms.view(len(matrices), -1), dim=1)
