"""What a checkpoint holds, and whether it fits: plain tensors, numbers and strings."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from singd import grafting
from singd.options import fused
from structured import Structure, parse

if TYPE_CHECKING:
    from singd.base import KroneckerOptimizer

Group = Mapping[str, Any]

# Saving ------------------------------------------------------------------------------------------


def pack(packed: dict[str, Any], optimizer: KroneckerOptimizer) -> dict[str, Any]:
    """What ``Optimizer.state_dict`` returns, with plain options and the names of parameters.

    Every parameter has an entry, and the tensors of a factor are numbered: so
    ``torch.distributed.checkpoint`` wants them.
    """
    names = parameter_names(optimizer)
    groups = []
    for own, group in zip(optimizer.param_groups, packed["param_groups"], strict=True):
        plain_names = [names.get(id(p), "") for p in own["params"]]
        groups.append(plain_group(group) | {"param_names": plain_names})
    state = {}
    for group in groups:
        for number in group["params"]:
            own = packed["state"].get(number, {})
            state[number] = {
                k: dict(enumerate(v)) if isinstance(v, list) else v for k, v in own.items()
            }
    return packed | {"state": state, "param_groups": groups}


def parameter_names(optimizer: KroneckerOptimizer) -> dict[int, str]:
    """The name in the model of every parameter, by its id."""
    named = optimizer.model.named_parameters()
    return {id(p): name.replace("_orig_mod.", "") for name, p in named}  # of torch.compile


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


def _is_function(name: str, value: Any) -> bool:
    return name not in ("structures", "wide_structure") and callable(value)


# Loading -----------------------------------------------------------------------------------------


def load(optimizer: KroneckerOptimizer, state_dict: Mapping[str, Any]) -> None:
    """Restore a state, or raise and change nothing; see ``load_state_dict``."""
    if not (isinstance(state_dict, Mapping) and {"state", "param_groups"} <= state_dict.keys()):
        raise ValueError("load_state_dict: expected a mapping with 'state' and 'param_groups'")
    saved = state_dict["param_groups"]
    check_groups(optimizer, saved)
    groups = merged(optimizer, saved)
    state = {
        number: {k: _listed(v) for k, v in own.items()}
        for number, own in state_dict["state"].items()
    }
    check_state(optimizer, state, groups)
    Optimizer.load_state_dict(optimizer, {"state": state, "param_groups": groups})
    # The base class casts to the parameter's dtype and may share memory: put copies back.
    for p, number in pairs(optimizer.param_groups, saved):
        if number in state:
            optimizer.state[p] = {k: copied(v, k, p) for k, v in state[number].items()}


def _tupled(value: Any) -> Any:
    """An option with tuples for lists: some formats know lists only."""
    if isinstance(value, Mapping):
        return {k: _tupled(v) for k, v in value.items()}
    return tuple(map(_tupled, value)) if isinstance(value, list | tuple) else value


def _comparable(value: Any) -> Any:
    """An option with every spec in its one spelling."""
    if isinstance(value, Mapping):
        return {k: _comparable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return tuple(map(_comparable, value))
    try:
        return str(parse(value)) if isinstance(value, str) else value
    except ValueError:
        return value  # not a spec


def _listed(value: Any) -> Any:
    """The numbered tensors of a factor as a list."""
    if isinstance(value, Mapping) and all(str(k).isdecimal() for k in value):
        return [value[k] for k in sorted(value, key=int)]
    return list(value) if isinstance(value, tuple) else value


def pairs(ours: Sequence[Group], saved: Sequence[Group]) -> Iterator[tuple[Tensor, Any]]:
    """Every parameter with its number in the checkpoint, or its name there."""
    for own, other in zip(ours, saved, strict=True):
        yield from zip(own["params"], other["params"], strict=True)


def merged(optimizer: KroneckerOptimizer, saved: Sequence[Group]) -> list[dict[str, Any]]:
    """Saved groups, with our options where they are functions, or not saved.

    Raises:
        ValueError: If an option is out of range.
    """
    known = optimizer.defaults.keys() | optimizer._adamw.defaults.keys()
    groups = []
    for index, (own, other) in enumerate(zip(optimizer.param_groups, saved, strict=True)):
        group = {k: v for k, v in own.items() if k in known}
        group |= copy.deepcopy({k: _tupled(v) for k, v in other.items() if k != "param_names"})
        group["params"] = list(other["params"])
        try:
            if group["rule"] == "kronecker":
                optimizer._check_group(group)
                if not isinstance(group["step"], int) or group["step"] < 0:
                    raise ValueError(f"step: expected an integer >= 0, got {group['step']!r}")
            else:
                options = inspect.signature(AdamW).parameters.keys() & known
                AdamW([torch.zeros(0)], **{k: group[k] for k in options})
        except (TypeError, ValueError) as error:
            raise ValueError(f"load_state_dict: group {index}: {error}") from error
        groups.append(group)
    return groups


def check_groups(optimizer: KroneckerOptimizer, saved: Any) -> None:
    """Raise unless the groups are as many, of the same parameters and of the same rule."""
    ours, names = optimizer.param_groups, parameter_names(optimizer)
    whole = isinstance(saved, list | tuple) and all(isinstance(g, Mapping) for g in saved)
    if not whole or not all(isinstance(g.get("params"), list | tuple) for g in saved):
        raise ValueError("load_state_dict: expected groups that list their 'params'")
    if len(ours) != len(saved):
        raise ValueError(f"load_state_dict: expected {len(ours)} groups, got {len(saved)}")
    for index, (own, other) in enumerate(zip(ours, saved, strict=True)):
        where = f"load_state_dict: group {index}"
        for key in ("rule", *optimizer._identity):
            expected, got = _comparable(plain(own.get(key))), _comparable(other.get(key))
            if expected != got:
                raise ValueError(f"{where}: expected {key} = {expected!r}, got {got!r}")
        expected, got = [names.get(id(p), "") for p in own["params"]], list(other["params"])
        if not all(isinstance(number, str) for number in got):
            got = other.get("param_names") or got
        if len(expected) != len(other["params"]):
            raise ValueError(
                f"{where}: expected {len(expected)} parameters, got {len(other['params'])}"
                f" ({_difference(expected, got)})"
            )
        if set(expected) == set(got) and expected != list(got):
            first = next(pair for pair in zip(expected, got, strict=True) if len({*pair}) > 1)
            raise ValueError(f"{where}: expected {first[0]}, got {first[1]}: another order")


def _difference(expected: Sequence[Any], got: Sequence[Any]) -> str:
    missing = [name for name in expected if name not in got]
    extra = [str(name) for name in got if name not in expected]
    return f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(extra) or 'none'}"


def check_state(
    optimizer: KroneckerOptimizer, state: Mapping[Any, Any], groups: Sequence[Group]
) -> None:
    """Raise unless all saved values are what belongs to their parameter.

    Args:
        optimizer: Whose parameters they are.
        state: Saved values by number of the parameter.
        groups: The groups as they will be.
    """
    names = parameter_names(optimizer)
    units = {id(unit.weight): unit for unit in optimizer._units}
    left = set(state)
    for own, group in zip(optimizer.param_groups, groups, strict=True):
        for p, number in zip(own["params"], group["params"], strict=True):
            values, name = state.get(number, {}), names.get(id(p), "a parameter")
            left.discard(number)
            fresh = {}
            if id(p) in units:
                unit = copy.copy(units[id(p)])
                unit.structures, unit.group = units[id(p)].structures, dict(group)
                fresh = optimizer._fresh(unit, (), "meta")
            _check_values(name, values, p, fresh)
    if left:
        raise ValueError(f"load_state_dict: state of unknown parameters {sorted(map(str, left))}")


def _check_values(
    name: str, values: Mapping[str, Any], p: Tensor, fresh: Mapping[str, Any]
) -> None:
    where = f"load_state_dict: {name}"
    lists = {key: list(member.tensors()) for key, member in fresh.items()}
    present = [key for key in lists if key in values]
    for key in lists:
        if present and key not in values and not key.startswith("m_"):
            raise ValueError(f"{where}: expected {key} beside {', '.join(present)}, got none")
    for key, value in values.items():
        if key == "step":
            expected: Any = torch.zeros(())
        elif key in _LIKE_PARAMETER:
            expected = p
        elif key in lists:
            expected = lists[key]
        elif key.startswith("m_"):
            continue  # of a momentum that was switched off; dropped at the next step
        else:
            raise ValueError(f"{where}: unknown state {key!r}")
        if shapes(value) != shapes(expected):
            raise ValueError(
                f"{where}: expected {key} of shape {shapes(expected)}, got {shapes(value)}"
            )


_LIKE_PARAMETER = (
    "momentum_buffer",
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    *grafting.state_names("adamw"),
)


def shapes(value: Any) -> Any:
    """The shape of a real tensor, or those of a list of them, as plain lists; else the type."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return list(value.shape)
    if isinstance(value, list):
        return [shapes(v) for v in value]
    return value.dtype if isinstance(value, Tensor) else type(value).__name__


def copied(value: Any, key: str, p: Tensor) -> Any:
    """A copy on the device of ``p``; the next step puts counters where they belong."""
    if isinstance(value, Tensor):
        return value.clone() if key == "step" else value.to(p.device, copy=True)
    return [copied(v, key, p) for v in value] if isinstance(value, list) else value


def wants_state(optimizer: KroneckerOptimizer) -> bool:
    """Whether the step that was asked for has no other purpose than that there be state.

    ``torch.distributed.checkpoint`` takes such a step, to have something to load into: with
    gradients and learning rates of zero, before any backward pass.
    """
    groups, units = optimizer.param_groups, optimizer._units
    if optimizer.state or any(group["lr"] for group in groups):
        return False
    if any(unit.passed_by or unit.statistics for unit in units):
        return False
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    return bool(grads) and not any(bool(g.any()) for g in grads)


def make_state(optimizer: KroneckerOptimizer) -> None:
    """The state of all parameters before any step. Ranks need not do so together."""
    _ = optimizer._buckets
    adamw, state = optimizer._adamw, optimizer.state
    adamw.param_groups = [fused(g) for g in optimizer.param_groups if g["rule"] == "adamw"]
    adamw.state = state
    adamw.step()
    for group in optimizer.param_groups:
        for p in group["params"]:
            if "step" in state[p]:
                state[p]["step"].zero_()
            if group["rule"] != "adamw":
                if group["momentum"]:
                    state[p]["momentum_buffer"] = torch.zeros_like(p)
                if group["graft"] == "adamw":
                    state[p] |= grafting.fresh(p, group)
