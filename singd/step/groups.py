"""Parameter groups: their options, rates, and what is counted in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from singd.methods.options import choice, graft_of, in_range, integer
from singd.step.skipping import write_

Group = dict[str, Any]

LOSS_AVERAGES = (None, "batch", "batch+sequence")
MOVING = ("params", "lr", "peak_lr", "step", "handed_over")
"""What changes from step to step by itself."""

GRAFTS = ("auto", None, "running", "rms", "sgd", "adamw")


def parameter_of(given: Any) -> Any:
    """The parameter, of a parameter or a pair ``(name, parameter)``."""
    return given[1] if isinstance(given, tuple) else given


def as_groups(params: Any, model: nn.Module) -> list[Group]:
    """What was given as ``params``, as a list of groups whose ``"params"`` are lists.

    Args:
        params: Parameters, pairs of name and parameter, or groups; ``None`` for all trainable ones.
        model: Model with the parameters.

    Raises:
        TypeError: If ``params`` is one tensor, or a set, whose order is not reproducible.
        ValueError: If it is empty.
    """
    if params is None:
        params = [p for p in model.parameters() if p.requires_grad]
    given = listed(params)
    if not given:
        raise ValueError("params: expected parameters or groups of them, got none")
    groups = given if isinstance(given[0], Mapping) else [{"params": given}]
    return [{**group, "params": listed(group["params"], alone=True)} for group in groups]


def listed(params: Any, *, alone: bool = False) -> list[Any]:
    """``params`` as a list, if it is one; a tensor too where it may stand alone."""
    if isinstance(params, Tensor):
        if alone:
            return [params]
        raise TypeError("params: expected an iterable of parameters or groups, got one tensor")
    if isinstance(params, set | frozenset):
        raise TypeError("params: expected an ordered collection of parameters, got a set")
    if not isinstance(params, Iterable):
        raise TypeError(
            "params: expected an iterable of parameters or groups, got "
            f"{type(params).__name__} (options such as lr are given by name)"
        )
    return list(params)


def check_watching(max_skipped: Any, telemetry: Any) -> None:
    """Raise ``ValueError`` if an option that says who looks at steps is out of range."""
    if max_skipped is not None:
        integer("max_skipped", max_skipped, 0)
    if telemetry is not None and not callable(telemetry):
        raise ValueError(f"telemetry: expected a function or None, got {telemetry!r}")


def check_group(group: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if an option that all methods share is out of range."""
    for name in ("lr", "damping", "weight_decay"):
        in_range(name, group[name], 0.0, float("inf"))
    in_range("momentum", group["momentum"], 0.0, 1.0, open_end=True)
    integer("T", group["T"], 1)
    integer("burn_in", group.get("burn_in", 0), 0)
    sample = group["sample"]
    if isinstance(sample, str) and sample != "last":
        raise ValueError(f"sample: expected an integer >= 1 or 'last', got {sample!r}")
    if sample != "last":
        integer("sample", sample, 1)
    integer("seed", group["seed"])
    choice("loss_average", group["loss_average"], LOSS_AVERAGES)
    choice("kfac_approx", group["kfac_approx"], ("expand", "reduce"))
    choice("graft", group["graft"], GRAFTS)
    choice("decoupled_weight_decay", group["decoupled_weight_decay"], (False, True))
    if group["kl_clip"] is not None:
        in_range("kl_clip", group["kl_clip"], 0.0, float("inf"))


class ChangedOptions:
    """Checks the options of groups that were set since the last step.

    Args:
        check: Function that raises ``ValueError`` if an option of the method is out of range.
    """

    def __init__(self, check: Callable[[Group], None]) -> None:
        self._check = check
        self._seen: dict[int, Group] = {}  # by the place of the group

    def check(self, groups: Sequence[Group]) -> None:
        """Raise ``ValueError`` if one is out of range; rates are a scheduler's."""
        for place, group in enumerate(groups):
            now = {name: value for name, value in group.items() if name not in MOVING}
            seen = self._seen.get(place, {})
            if now.keys() != seen.keys() or any(now[name] is not seen[name] for name in now):
                given = {**group, "lr": 0.0}  # which may be a tensor, and to read it may wait
                check_group(given)
                self._check(given)
                self._seen[place] = now


def counters(group: Group) -> Group:
    """What is counted in a new group: steps, the highest rate, and weights handed over to AdamW."""
    lr = group["lr"]
    return {
        "handed_over": tuple(group.get("handed_over", ())),
        "step": group.get("step", 0),
        "peak_lr": torch.zeros_like(lr) if isinstance(lr, Tensor) else 0.0,
    }


def sees_scale(group: Group) -> bool:
    """Whether a step depends on the scale of the curvature, and so on ``loss_average``."""
    relative = group.get("relative_damping", False) and group.get("scale_init", False)
    return not relative or graft_of(group) is None


def peak_lr(group: Group) -> float | Tensor:
    """The highest learning rate of a step so far, this one included; a tensor of tensors."""
    lr, peak = group["lr"], group["peak_lr"]
    if isinstance(peak, Tensor):
        return peak.clamp(min=lr)
    return lr.clamp(min=peak) if isinstance(lr, Tensor) else max(lr, peak)


def keep_peak_lr(group: Group, unless: Tensor | None) -> None:
    """Remember the highest learning rate, at its place if it is a tensor.

    Args:
        group: Group of a step that was taken.
        unless: Truth value on the device: if it is true, a tensor stays.
    """
    peak, new = group["peak_lr"], peak_lr(group)
    if isinstance(peak, Tensor) and isinstance(new, Tensor):
        write_(peak, new, unless)
    else:
        group["peak_lr"] = new


def is_due(group: Group) -> bool:
    """Whether the next step updates factors; it is the step that refuses a wrong ``T``."""
    return is_burning_in(group) or group["step"] % max(group["T"], 1) == 0


def is_burning_in(group: Group) -> bool:
    """Whether the next step is one of the first, all of which update factors."""
    return group["step"] < group.get("burn_in", 0)


def check_burn_in_is_over(groups: Iterable[Group]) -> None:
    """Raise ``RuntimeError`` if a step that a CUDA graph records would be of a burn-in."""
    for group in groups:
        if is_burning_in(group):
            raise RuntimeError(
                "replays of a step of the burn-in would all be of it: expected burn_in=0 or at "
                f"least {group['burn_in']} steps before a CUDA graph is recorded, got step "
                f"{group['step']}"
            )


def counter_device(p: Tensor) -> torch.device:
    """Where steps of ``p`` are counted by AdamW or grafting: with it where no step may wait."""
    return p.device if p.is_cuda else torch.device("cpu")
