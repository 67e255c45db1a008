"""What a checkpoint holds, and whether it fits: plain tensors, numbers and strings."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from structured import Structure, parse

if TYPE_CHECKING:
    from singd.base import KroneckerOptimizer

Group = Mapping[str, Any]


def plain(value: Any) -> Any:
    """An option as a checkpoint holds it: classes and structures as specs, inside tuples too."""
    if isinstance(value, tuple | list):
        return type(value)(plain(v) for v in value)
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, Structure) or callable(value):
        return str(parse(value))
    return value


def plain_group(group: Group) -> dict[str, Any]:
    """A parameter group without options that are functions."""
    return {k: plain(v) for k, v in group.items() if not _is_function(k, v)}


def merged(ours: Sequence[Group], saved: Sequence[Group]) -> list[dict[str, Any]]:
    """Saved groups, with our options where they are functions."""
    return [
        {k: v for k, v in own.items() if _is_function(k, v)} | copy.deepcopy(dict(other))
        for own, other in zip(ours, saved, strict=True)
    ]


def pairs(ours: Sequence[Group], saved: Sequence[Group]) -> Iterator[tuple[Tensor, int]]:
    """Every parameter with its number in the checkpoint."""
    for own, other in zip(ours, saved, strict=True):
        yield from zip(own["params"], other["params"], strict=True)


def load(optimizer: KroneckerOptimizer, state_dict: Mapping[str, Any]) -> None:
    """Restore a state, or raise and change nothing; see ``load_state_dict``."""
    state, saved = state_dict["state"], state_dict["param_groups"]
    units = {id(unit.weight): unit for unit in optimizer._units}
    check_groups(optimizer.param_groups, saved, ("rule", *optimizer._identity))
    names = {id(p): name for name, p in optimizer.model.named_parameters()}
    for p, number in pairs(optimizer.param_groups, saved):
        expected: dict[str, Any] = {"momentum_buffer": p, "exp_avg": p, "exp_avg_sq": p}
        if id(p) in units:
            fresh = optimizer._fresh(units[id(p)], (), "meta")
            expected |= {name: list(member.tensors()) for name, member in fresh.items()}
        check_state(names.get(id(p), "parameter"), state.get(number, {}), expected)
    groups = merged(optimizer.param_groups, saved)
    Optimizer.load_state_dict(optimizer, {"state": state, "param_groups": groups})
    # The base class casts to the parameter's dtype and may share memory: put copies back.
    for p, number in pairs(optimizer.param_groups, saved):
        if number in state:
            optimizer.state[p] = {k: copied(v, k, p) for k, v in state[number].items()}


def check_groups(ours: Sequence[Group], saved: Sequence[Group], keys: Sequence[str]) -> None:
    """Raise unless the groups are as many, as large, and agree in ``keys``."""
    if len(ours) != len(saved):
        raise ValueError(f"load_state_dict: expected {len(ours)} groups, got {len(saved)}")
    for index, (own, other) in enumerate(zip(ours, saved, strict=True)):
        for key in keys:
            expected, got = plain(own.get(key)), other.get(key)
            if expected != got:
                raise ValueError(
                    f"load_state_dict: group {index}: expected {key} = {expected!r}, got {got!r}"
                )
        if len(own["params"]) != len(other["params"]):
            raise ValueError(
                f"load_state_dict: group {index}: expected {len(own['params'])} parameters, "
                f"got {len(other['params'])}"
            )


def check_state(name: str, state: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise unless the saved tensors of the parameter ``name`` have the expected shapes."""
    for key, value in state.items():
        if key in expected and shapes(value) != shapes(expected[key]):
            raise ValueError(
                f"load_state_dict: {name}: expected {key} of shape {shapes(expected[key])}, "
                f"got {shapes(value)}"
            )


def shapes(value: Any) -> Any:
    """The shape of a tensor, or those of a list of them, as plain lists."""
    if isinstance(value, Tensor):
        return list(value.shape)
    return [shapes(v) for v in value] if isinstance(value, list | tuple) else value


def copied(value: Any, key: str, p: Tensor) -> Any:
    """A copy on the device of ``p``; step counters stay where they are."""
    if isinstance(value, Tensor):
        return value.clone() if key == "step" else value.to(p.device, copy=True)
    return [copied(v, key, p) for v in value] if isinstance(value, list) else value


def _is_function(name: str, value: Any) -> bool:
    return name not in ("structures", "wide_structure") and callable(value)
