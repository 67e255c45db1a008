"""Grafting: the direction of the preconditioned gradient, with the length of another step.

The length is taken layer by layer, over weight and bias together. Source: Agarwal et al.,
"Disentangling Adaptive Gradient Methods from Learning Rates", arXiv 2002.11803; so does Distributed
Shampoo, arXiv 2309.06497, Section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from singd.capture import Unit

METHODS = (None, "sgd", "adamw")

State = Mapping[Tensor, dict[str, Any]]


def state_names(method: str | None) -> tuple[str, ...]:
    """What is stored of a parameter: its shape, and a step counter beside."""
    return ("graft_exp_avg", "graft_exp_avg_sq") if method == "adamw" else ()


def make_state(p: Tensor, state: dict[str, Any]) -> None:
    """AdamW's moments of a parameter before any step."""
    if "graft_exp_avg" not in state:
        zeros = {name: torch.zeros_like(p) for name in state_names("adamw")}
        state |= {"step": torch.tensor(0.0), **zeros}


def graft_(
    natural: Tensor, units: Sequence[Unit], method: str, options: Mapping[str, Any], state: State
) -> None:
    """Give preconditioned gradients the norm of another method's step at a rate of one, in place.

    Args:
        natural: Of the units, ``[units, ..., d_out, d_in]``.
        units: Their layers; parameters without a gradient do not count.
        method: ``"sgd"``, the norm of the gradient; ``"adamw"``, that of AdamW's step without
            weight decay.
        options: Of AdamW.
        state: By parameter; AdamW's moments are kept there.
    """
    parts = [
        (index, p, p.grad, direction)
        for index, (unit, matrix) in enumerate(zip(units, natural, strict=True))
        for p, direction in zip(unit.parameters, unit.split(matrix), strict=True)
        if p.grad is not None
    ]
    grads = [grad for _, _, grad, _ in parts]
    if method == "adamw":
        grads = _adamw_steps([p for _, p, _, _ in parts], grads, options, state)
    index = torch.tensor([i for i, *_ in parts], device=natural.device)
    wanted = _norms(index, len(units), grads)
    own = _norms(index, len(units), [direction for *_, direction in parts])
    scale = wanted / own.clamp(min=torch.finfo(own.dtype).tiny)
    natural.mul_(scale.to(natural.dtype).view(-1, *[1] * (natural.ndim - 1)))


def _norms(index: Tensor, units: int, tensors: list[Tensor]) -> Tensor:
    """Joint norms of the tensors of every unit, ``[units]``, in float32 at least."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    norms = torch.stack(torch._foreach_norm([t.to(wide) for t in tensors]))
    return norms.new_zeros(units).index_add_(0, index, norms.square()).sqrt()


def _adamw_steps(
    params: list[Tensor], grads: list[Tensor], options: Mapping[str, Any], state: State
) -> list[Tensor]:
    """What AdamW would add to parameters at a rate of one, and no weight decay."""
    for p in params:
        make_state(p, state[p])
    own, steps = [state[p] for p in params], [torch.zeros_like(p) for p in params]
    beta1, beta2 = options["betas"]
    adamw(
        steps,
        grads,
        [s["graft_exp_avg"] for s in own],
        [s["graft_exp_avg_sq"] for s in own],
        [],
        [s["step"] for s in own],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=1.0,
        weight_decay=0.0,
        eps=options["eps"],
        maximize=False,
    )
    return steps
