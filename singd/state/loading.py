"""Fitting a saved state to the parameters and options of an optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from singd.state import checkpoint
from singd.step.fallback import check_rates
from singd.step.groups import Group, check_group
from singd.step.initial import expected_values
from singd.step.pipeline import Parts


def names(parts: Parts, groups: Sequence[Group]) -> list[list[str]]:
    """The names of all parameters, group by group."""
    return [[parts.parameters.name(p) for p in group["params"]] for group in groups]


def fitting(
    parts: Parts, groups: Sequence[Group], options: Sequence[str], state_dict: Any
) -> dict[str, Any]:
    """A state to be loaded, checked to be one of this optimizer.

    Args:
        parts: The objects that take a step.
        groups: Groups of the optimizer.
        options: Options that are taken from the groups where the state has none.
        state_dict: What was saved, possibly by way of a file.

    Raises:
        ValueError: If it is of another model, method or structure.
    """

    def check_saved(group: Mapping[str, Any]) -> None:
        check_group(group)
        check_rates(group["adamw"])
        parts.method.check(group)

    parts.placement.prepare()
    fitted = checkpoint.unpack(
        state_dict, groups, names(parts, groups), parts.method.identity, options, check_saved
    )
    for p, number, group in _numbered(groups, fitted):
        entry = fitted["state"].get(number, {})
        checkpoint.check_values(parts.parameters.name(p), entry, expected_values(parts, p, group))
    return fitted


def copies(groups: Sequence[Group], fitted: Mapping[str, Any]) -> dict[Tensor, dict[str, Any]]:
    """Copies of the values, by parameter: PyTorch casts to the parameter's dtype, or shares."""
    return {
        p: {k: checkpoint.copied(v, k, p) for k, v in fitted["state"][number].items()}
        for p, number, _ in _numbered(groups, fitted)
        if number in fitted["state"]
    }


def _numbered(groups: Sequence[Group], state: Mapping[str, Any]) -> list[tuple[Any, Any, Group]]:
    """Every parameter with its number and its group in a state."""
    saved = [(n, group) for group in state["param_groups"] for n in group["params"]]
    parameters = [p for group in groups for p in group["params"]]
    return [(p, n, group) for p, (n, group) in zip(parameters, saved, strict=True)]
