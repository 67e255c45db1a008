"""What a checkpoint holds, and whether it fits: plain tensors, numbers and strings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from singd.ops.storage import recognize
from singd.step.entries import is_count
from structured import Structure, parse

Group = Mapping[str, Any]
Shapes = Mapping[str, Any]
"""What the state of a parameter may hold: tensors, or lists of tensors, by name."""

# Saving ------------------------------------------------------------------------------------------


def pack(packed: Mapping[str, Any], names: Sequence[Sequence[str]]) -> dict[str, Any]:
    """What ``Optimizer.state_dict`` returns, with plain options and the names of each group.

    Every parameter has an entry, and the tensors of a factor are numbered: so
    ``torch.distributed.checkpoint`` wants them.
    """
    groups = [
        plain_group(group) | {"param_names": list(own)}
        for group, own in zip(packed["param_groups"], names, strict=True)
    ]
    state = {}
    for group in groups:
        for number in group["params"]:
            entry = packed["state"].get(number, {})
            state[number] = {
                k: dict(enumerate(v)) if isinstance(v, list) else v for k, v in entry.items()
            }
    return {**packed, "state": state, "param_groups": groups}


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
    """A parameter group without options that are functions; structures are written as specs."""
    specs = ("structures", "wide_structure")
    return {k: plain(v) for k, v in group.items() if k in specs or not callable(v)}


# Loading -----------------------------------------------------------------------------------------


def unpack(
    state_dict: Any,
    groups: Sequence[Group],
    names: Sequence[Sequence[str]],
    identity: Sequence[str],
    options: Sequence[str],
    check_group: Callable[[Group], None],
) -> dict[str, Any]:
    """A state that fits the optimizer, to be loaded: groups, and values by number.

    Args:
        state_dict: What :func:`pack` made, possibly by way of a file.
        groups: Groups of the optimizer that loads.
        names: Names of its parameters, group by group.
        identity: Options that both must share.
        options: Options that are taken from the optimizer where the state has none.
        check_group: Raises if an option of a group is out of range.

    Raises:
        ValueError: If it is no such state, or of another model, method or structure.
    """
    if not (isinstance(state_dict, Mapping) and {"state", "param_groups"} <= state_dict.keys()):
        raise ValueError("load_state_dict: expected a mapping with 'state' and 'param_groups'")
    saved = state_dict["param_groups"]
    _check_groups(groups, saved, names, identity)
    merged = []
    for index, (own, other) in enumerate(zip(groups, saved, strict=True)):
        group = {k: v for k, v in own.items() if k in options}
        group |= copy.deepcopy({k: tupled(v) for k, v in other.items() if k != "param_names"})
        group["params"] = list(other["params"])
        try:
            check_group(group)
            if not isinstance(group["step"], int) or group["step"] < 0:
                raise ValueError(f"step: expected an integer >= 0, got {group['step']!r}")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"load_state_dict: group {index}: {error}") from error
        merged.append(group)
    state = {
        number: {k: listed(v) for k, v in entry.items()}
        for number, entry in state_dict["state"].items()
    }
    unknown = state.keys() - {number for group in merged for number in group["params"]}
    if unknown:
        numbers = sorted(map(str, unknown))
        raise ValueError(f"load_state_dict: state of unknown parameters {numbers}")
    return {"state": state, "param_groups": merged}


def tupled(value: Any) -> Any:
    """An option with tuples for lists: some formats know lists only."""
    if isinstance(value, Mapping):
        return {k: tupled(v) for k, v in value.items()}
    return tuple(map(tupled, value)) if isinstance(value, list | tuple) else value


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


def listed(value: Any) -> Any:
    """The numbered tensors of a factor as a list."""
    if isinstance(value, Mapping) and all(str(k).isdecimal() for k in value):
        return [value[k] for k in sorted(value, key=int)]
    return list(value) if isinstance(value, tuple) else value


def _check_groups(
    groups: Sequence[Group], saved: Any, names: Sequence[Sequence[str]], identity: Sequence[str]
) -> None:
    """Raise unless the groups are as many, of the same parameters and of the same kind."""
    whole = isinstance(saved, list | tuple) and all(isinstance(g, Mapping) for g in saved)
    if not whole or not all(isinstance(g.get("params"), list | tuple) for g in saved):
        raise ValueError("load_state_dict: expected groups that list their 'params'")
    if len(groups) != len(saved):
        raise ValueError(f"load_state_dict: expected {len(groups)} groups, got {len(saved)}")
    for index, (own, other) in enumerate(zip(groups, saved, strict=True)):
        where = f"load_state_dict: group {index}"
        absent = [key for key in identity if key in own and key not in other]
        if absent:
            raise ValueError(
                f"{where}: expected the options of this optimizer's method, got none of {absent}: "
                "the state is that of another method"
            )
        for key in identity:
            expected, got = _comparable(plain(own.get(key))), _comparable(other.get(key))
            if expected != got:
                raise ValueError(f"{where}: expected {key} = {expected!r}, got {got!r}")
        expected, got = list(names[index]), list(other["params"])
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


def check_values(name: str, values: Mapping[str, Any], expected: Shapes) -> None:
    """Raise ``ValueError`` unless all saved values are what belongs to a parameter.

    Args:
        name: Name of the parameter.
        values: Saved values.
        expected: Values of the same shapes. Lists are factors, which are there together.
    """
    where = f"load_state_dict: {name}"
    factors = [k for k, v in expected.items() if isinstance(v, list) and not _is_momentum(k)]
    present = [key for key in factors if key in values]
    for key in factors:
        if present and key not in values:
            raise ValueError(f"{where}: expected {key} beside {', '.join(present)}, got none")
    for key, value in values.items():
        if key not in expected:
            if _is_momentum(key):
                continue  # one that was switched off; dropped at the next step
            raise ValueError(f"{where}: unknown state {key!r}")
        if not _fits(value, expected[key]):
            raise ValueError(
                f"{where}: expected {key} of shape {shapes(expected[key])}, got {shapes(value)}"
            )


def _fits(value: Any, expected: Any) -> bool:
    """Whether a value is of the same shape; or the tensors of a factor, in whatever form."""
    are_tensors = isinstance(value, list) and all(isinstance(t, Tensor) for t in value)
    if are_tensors and isinstance(expected, list):
        return recognize(value, [t.shape for t in expected]) is not None
    return bool(shapes(value) == shapes(expected))


def _is_momentum(key: str) -> bool:
    return key.rpartition(".")[2].startswith("m_")


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
        if key == "step":
            return value.to(torch.float32, copy=True)
        dtype = torch.promote_types(value.dtype, torch.float32) if is_count(key) else value.dtype
        return value.to(p.device, dtype, copy=True)
    return [copied(v, key, p) for v in value] if isinstance(value, list) else value
