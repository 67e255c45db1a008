"""The state of an optimizer before any step, and what it may hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from singd.methods.options import graft_of
from singd.ops.dtensor import local
from singd.step import grafting
from singd.step.entries import GRAFT_NORM, State, state_key
from singd.step.groups import Group
from singd.step.pipeline import Parts


def expected_values(parts: Parts, p: Tensor, group: Group) -> dict[str, Any]:
    """What the state of a parameter may hold: tensors, or lists of tensors, of these shapes.

    ``group`` is its group as it will be.
    """
    found: dict[str, Any] = {"step": torch.zeros(()), "momentum_buffer": p}
    names = (*grafting.ADAMW_NAMES, "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    found |= dict.fromkeys(names, p)
    for matrix in parts.parameters.matrices:
        if matrix.weight is p:
            found[state_key(matrix, GRAFT_NORM)] = torch.zeros(2)
            factors = parts.store.template(matrix, group)
            for name, member in factors.members().items():
                found[state_key(matrix, name)] = list(member.tensors())
    return found


def wants_state(parts: Parts, groups: Sequence[Group], state: State) -> bool:
    """Whether the step that was asked for has no other purpose than that there be state.

    ``torch.distributed.checkpoint`` takes such a step, to have something to load into: with
    gradients and learning rates of zero, before any backward pass.
    """
    if state or any(group["lr"] for group in groups):
        return False
    if any(a.was_ignored or a.total for a in parts.capture.accumulators.values()):
        return False
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    return bool(grads) and not any(bool(local(g).any()) for g in grads)


def make_state(parts: Parts, state: State) -> None:
    """Make all that is stored beside factors. Ranks need not do so together."""
    for _, some in parts.parameters.fallback():
        for p in some:
            state[p] |= parts.fallback.init(p)
    for matrix, group in parts.parameters.preconditioned().items():
        for p in matrix.parameters:
            if parts.parameters.group_of[p]["momentum"]:  # a bias may have another group
                state[p]["momentum_buffer"] = torch.zeros_like(p)
            if group["graft"] == "adamw":
                state[p] |= grafting.init(p)
        if graft_of(group) == "running":
            entry = state[matrix.weight]
            entry[state_key(matrix, GRAFT_NORM)] = grafting.no_norms(matrix.weight)
