"""Options and parameter groups as they are given: their form, and their ranges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]

LOSS_AVERAGES = (None, "batch", "batch+sequence")


def parameter_of(given: Any) -> Any:
    """The parameter, of a parameter or a pair ``(name, parameter)``."""
    return given[1] if isinstance(given, tuple) else given


def given_group(group: Mapping[str, Any]) -> Group:
    """A parameter group as a dictionary whose ``"params"`` is a list."""
    params = group["params"]
    return {**group, "params": [params] if isinstance(params, Tensor) else list(params)}


def peak_lr(group: Group) -> float | Tensor:
    """The highest learning rate that a group has had; of tensors a tensor, for no look at them."""
    lr, peak = group["lr"], group.get("peak_lr", 0.0)
    if isinstance(peak, Tensor):
        return peak.clamp(min=lr)
    highest: float | Tensor = lr.clamp(min=peak) if isinstance(lr, Tensor) else max(lr, peak)
    return highest


def keep_peak(group: Group) -> None:
    """Remember the highest learning rate, at its place if it is a tensor."""
    peak = group.get("peak_lr")
    if isinstance(peak, Tensor):
        peak.clamp_(min=group["lr"])
    else:
        group["peak_lr"] = peak_lr(group)


def fused(group: Group) -> Group:
    """A group for AdamW, fused where that is possible and nothing else was asked for."""
    if group["fused"] is not None or group["foreach"] is not None or group["differentiable"]:
        return group
    params = group["params"]
    if not all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in params):
        return group
    on_cuda = all(p.is_cuda for p in params)  # where it counts its steps on the device anyway
    return {**group, "fused": True, "capturable": group["capturable"] or on_cuda}


def counter_device(p: Tensor, group: Group) -> torch.device:
    """Where steps of ``p`` are counted, for AdamW or grafting: with it where no step may wait."""
    own = fused(group) if group["rule"] == "adamw" else {"fused": p.is_cuda, "capturable": False}
    return p.device if own["fused"] or own["capturable"] else torch.device("cpu")


def in_range(name: str, value: Any, low: float, high: float, *, open_end: bool = False) -> None:
    """Raise unless ``low <= value <= high`` (or ``< high``, and where ``high`` is infinite)."""
    open_end = open_end or high == float("inf")
    good = isinstance(value, int | float | Tensor) and not isinstance(value, bool)
    if not good or not (low <= value and (value < high if open_end else value <= high)):
        bracket = ")" if open_end else "]"
        raise ValueError(f"{name}: expected a number in [{low:g}, {high:g}{bracket}, got {value!r}")


def one_of(name: str, value: Any, known: Sequence[Any]) -> None:
    """Raise unless ``value`` is one of ``known``."""
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}")


def integer(name: str, value: Any, low: int | None = None) -> None:
    """Raise unless ``value`` is an integer, and not below ``low``."""
    if not isinstance(value, int) or isinstance(value, bool) or (low is not None and value < low):
        bound = "" if low is None else f" >= {low}"
        raise ValueError(f"{name}: expected an integer{bound}, got {value!r}")


def pair(name: str, value: Any) -> None:
    """Raise unless ``value`` has two parts, for K and for C."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError(f"{name}: expected a pair, for K and for C, got {value!r}")


def floating(name: str, value: Any) -> None:
    """Raise unless ``value`` is a real data type, or ``None``."""
    if value is not None and not (isinstance(value, torch.dtype) and value.is_floating_point):
        raise ValueError(f"{name}: expected a floating-point dtype or None, got {value!r}")


def by_name(given: Any, name: str, default: Any) -> Any:
    """An option; or, of a mapping from patterns, what the first pattern gives that matches."""
    if not isinstance(given, Mapping):
        return given
    return next((value for pattern, value in given.items() if fnmatch(name, pattern)), default)
