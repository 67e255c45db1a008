"""Fitting a saved state to the parameters and options of an optimizer."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from singd.capture.weight_matrix import WeightMatrix
from singd.ops.dtensor import whole
from singd.ops.storage import decode
from singd.state import checkpoint
from singd.step.entries import recognized, state_key
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

    ``options`` are taken from the groups where the state has none.

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


def copies(
    parts: Parts, groups: Sequence[Group], fitted: Mapping[str, Any]
) -> dict[Tensor, dict[str, Any]]:
    """Copies of the values, by parameter: PyTorch casts to the parameter's dtype, or shares.

    Factors are whole, or this rank's part, and only where this rank has them.
    """
    found = {}
    for p, number, group in _numbered(groups, fitted):
        if number in fitted["state"]:
            entry = {k: _whole(v) for k, v in fitted["state"][number].items()}
            found[p] = {
                k: checkpoint.copied(v, k, p)
                for k, v in entry.items()
                if not isinstance(v, list) or _is_held(parts, p, k)
            }
            _cut(parts, p, group, found[p])
    return found


def put(state: MutableMapping[Any, Any], values: Mapping[Tensor, dict[str, Any]]) -> None:
    """Put values into a state, without empty entries: PyTorch takes any entry for a used state."""
    state.update(values)
    for p in [p for p, entry in state.items() if not entry]:
        del state[p]


def spread(parts: Parts, groups: Sequence[Group], state_dict: Mapping[str, Any]) -> None:
    """Put factors that not every rank has into a state as DTensors; all ranks do so together.

    The state is what ``Optimizer.state_dict`` returns, and is changed in place.
    """
    placement, state = parts.placement, state_dict["state"]
    groups_of = parts.parameters.preconditioned()
    names_of = {m: _names(parts, m) for m in groups_of}
    some = [m for m in groups_of if names_of[m] is None or names_of[m]]
    if not some or not state:
        return
    numbers = {p: number for p, number, _ in _numbered(groups, state_dict)}
    items: list[tuple[WeightMatrix, Tensor, Tensor | None]] = []
    lists: list[list[Tensor]] = []
    for matrix in some:
        number = numbers[matrix.weight]
        entry = state[number] = dict(state.get(number, {}))
        chosen = names_of[matrix]
        for name, like in parts.store.stored_template(matrix, groups_of[matrix]).items():
            key = state_key(matrix, name)
            if chosen is not None and name not in chosen:
                continue
            held = entry.pop(key, None) or [None] * len(like)  # all ranks then have it last
            items += [(matrix, t, own) for t, own in zip(like, held, strict=True)]
            entry[key] = list[Tensor]()
            lists += [entry[key]] * len(like)
    for into, t in zip(lists, placement.spread(items), strict=True):
        into.append(t)


def _names(parts: Parts, matrix: WeightMatrix) -> tuple[str, ...] | None:
    """The members of a matrix that ranks share; ``None`` if one rank has all of them."""
    if parts.placement.owner_of(matrix) is not None:
        return None
    part = parts.placement.part_of(matrix)
    return () if part is None else parts.method.members_of[part.side]


def _cut(parts: Parts, p: Tensor, group: Group, entry: dict[str, Any]) -> None:
    """Leave of whole factors, in whatever form, what this rank has of them."""
    for matrix in parts.parameters.matrices:
        part = parts.placement.part_of(matrix) if matrix.weight is p else None
        if part is None:
            continue
        like = parts.store.template(matrix, group).members()
        for name in parts.method.members_of[part.side]:
            key = state_key(matrix, name)
            if name in like and isinstance(entry.get(key), list):
                shapes = [t.shape for t in like[name].tensors()]
                forms = recognized(matrix, name, entry[key], shapes)
                own = part.of(like[name].with_tensors(decode(entry[key], forms)))
                entry[key] = [t.clone() for t in own.tensors()]


def _is_held(parts: Parts, p: Tensor, key: str) -> bool:
    """Whether this rank has a factor of a parameter."""
    label = key.rpartition(".")[0]
    return all(
        parts.placement.holds(matrix)
        for matrix in parts.parameters.matrices
        if matrix.weight is p and matrix.label == label
    )


def _whole(value: Any) -> Any:
    """Factors gathered from all ranks."""
    return [whole(v) for v in value] if isinstance(value, list) else value


def _numbered(groups: Sequence[Group], state: Mapping[str, Any]) -> list[tuple[Any, Any, Group]]:
    """Every parameter with its number and its group in a state."""
    saved = [(n, group) for group in state["param_groups"] for n in group["params"]]
    parameters = [p for group in groups for p in group["params"]]
    return [(p, n, group) for p, (n, group) in zip(parameters, saved, strict=True)]
