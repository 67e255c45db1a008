"""Grafting: the direction of the preconditioned gradient, with the length of another step.

The length is taken layer by layer, over weight and bias together. Source: Agarwal et al.,
"Disentangling Adaptive Gradient Methods from Learning Rates", arXiv 2002.11803; so does Distributed
Shampoo, arXiv 2309.06497, Section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from singd.capture import Unit
from singd.options import Group, counter_device

if TYPE_CHECKING:
    from singd.base import KroneckerOptimizer

METHODS = (None, "sgd", "adamw")

Moments = list[tuple[Tensor, dict[str, Tensor]]]


def state_names(method: str | None) -> tuple[str, ...]:
    """What is stored of a parameter: its shape, and a step counter beside."""
    return ("graft_exp_avg", "graft_exp_avg_sq") if method == "adamw" else ()


def fresh(p: Tensor, group: Group) -> dict[str, Tensor]:
    """AdamW's moments of a parameter before any step; steps are counted where nothing waits."""
    zeros = {name: torch.zeros_like(p) for name in state_names("adamw")}
    return {"step": torch.zeros((), device=counter_device(p, group)), **zeros}


def graft_(
    natural: Tensor, G: Tensor, units: Sequence[Unit], optimizer: KroneckerOptimizer
) -> Moments:
    """Give preconditioned gradients the norm of another method's step at a rate of one, in place.

    The option ``graft`` of the units says which: ``"sgd"``, the norm of the gradient; ``"adamw"``,
    that of AdamW's step without weight decay.

    Args:
        natural: Of the units, ``[units, ..., d_out, d_in]``.
        G: The gradients likewise.
        units: Their layers; parameters without a gradient do not count.
        optimizer: Whose options of AdamW and whose state count; neither is changed.

    Returns:
        New values in the state, by parameter.
    """
    parts = [
        (p, grad, direction)
        for unit, g, matrix in zip(units, G, natural, strict=True)
        for p, grad, direction in zip(
            unit.parameters, unit.split(g), unit.split(matrix), strict=True
        )
    ]
    counts = [p.grad is not None for p, *_ in parts]
    wanted, moments = [grad for _, grad, _ in parts], Moments()
    if units[0].group["graft"] == "adamw":
        params = [p for p, *_ in parts]
        moments = [
            (
                p,
                {
                    k: s[k].to(zero, copy=True) if k in s else zero
                    for k, zero in fresh(p, units[0].group).items()
                },
            )
            for p, s in zip(params, map(optimizer.state.__getitem__, params), strict=True)
        ]
        wanted = _adamw_steps(wanted, [own for _, own in moments], optimizer._adamw.defaults)
        moments = [own for own, counted in zip(moments, counts, strict=True) if counted]
    norms = _norms([direction for *_, direction in parts], counts, len(units))
    scale = _norms(wanted, counts, len(units)) / norms.clamp(min=torch.finfo(norms.dtype).tiny)
    natural.mul_(scale.to(natural.dtype).view(-1, *[1] * (natural.ndim - 1)))
    return moments


def _norms(tensors: list[Tensor], counts: list[bool], units: int) -> Tensor:
    """Joint norms of those of every unit's tensors that count, ``[units]``, in float32 at least."""
    wide, nothing = torch.promote_types(tensors[0].dtype, torch.float32), tensors[0].new_zeros(1)
    used = [t if counted else nothing for t, counted in zip(tensors, counts, strict=True)]
    norms = torch.stack(torch._foreach_norm([t.to(wide) for t in used]))
    return torch.linalg.vector_norm(norms.view(units, -1), dim=1)


def _adamw_steps(
    grads: list[Tensor], moments: list[dict[str, Tensor]], options: Mapping[str, Any]
) -> list[Tensor]:
    """What AdamW adds to parameters at a rate of one, without weight decay; moves the moments."""
    steps, (beta1, beta2) = [torch.zeros_like(g) for g in grads], options["betas"]
    adamw(
        steps,
        grads,
        [own["graft_exp_avg"] for own in moments],
        [own["graft_exp_avg_sq"] for own in moments],
        [],
        [own["step"] for own in moments],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=1.0,
        weight_decay=0.0,
        eps=options["eps"],
        maximize=False,
        capturable=all(g.is_cuda for g in grads),
    )
    return steps
