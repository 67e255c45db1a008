"""AdamW for every parameter that is not preconditioned, in the same groups.

Its rate is a ratio to the group's: ``lr`` and schedules of a group reach everything in it. Its
weight decay is the group's, decoupled. The functional form of PyTorch is called, so that global
hooks of optimizers see one step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.adamw import adamw

from singd.methods.options import in_range
from singd.ops.dtensor import local
from singd.ops.grouping import grouped
from singd.step.entries import State
from singd.step.groups import Group, counter_device


class Fallback:
    """AdamW's options, and its step.

    Args:
        options: Options of :class:`torch.optim.AdamW`. Its ``lr`` belongs to the ``lr`` of the
            constructor, and becomes their ratio; its ``weight_decay`` counts in groups that are
            given none.
        lr: Rate of the constructor.
        ratio: AdamW's rate as a ratio to the group's, if ``options`` has no ``lr``.

    Raises:
        ValueError: If an option is out of range, or there is no such option.
    """

    def __init__(self, options: Mapping[str, Any] | None, lr: float | Tensor, ratio: float) -> None:
        given = dict(options or {})
        try:
            self.options: dict[str, Any] = dict(AdamW([torch.zeros(0)], **given).defaults)
        except TypeError as error:
            raise ValueError(f"adamw: {error}") from error
        if self.options["maximize"]:
            raise ValueError("adamw: expected maximize=False, got True: negate the loss instead")
        self._ratio = _ratio(given["lr"], lr) if "lr" in given else ratio
        self._weight_decay: float | None = given.get("weight_decay")

    def for_group(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """``lr_ratio`` and ``weight_decay`` of a group, kept in its key ``"adamw"``.

        Args:
            given: Group as it was given; its own ``"adamw"`` may hold ``lr`` and ``weight_decay``.
        """
        own = dict(given.get("adamw") or {})
        unknown = own.keys() - {"lr", "weight_decay", "lr_ratio"}
        if unknown:
            raise ValueError(
                f"adamw: expected lr and weight_decay in a group, got {', '.join(sorted(unknown))}"
            )
        decay = None if "weight_decay" in given else self._weight_decay
        ratio = _ratio(own["lr"], given["lr"]) if "lr" in own else own.get("lr_ratio", self._ratio)
        rates = {"lr_ratio": ratio, "weight_decay": own.get("weight_decay", decay)}
        check_rates(rates)
        return rates

    def state_names(self) -> list[str]:
        """What is stored of a parameter, like it; a step counter beside."""
        names = ["exp_avg", "exp_avg_sq"]
        return [*names, "max_exp_avg_sq"] if self.options["amsgrad"] else names

    def is_fused(self, parameters: Iterable[Tensor]) -> bool:
        """Whether PyTorch's fused kernel serves, and nothing else was asked for."""
        asked = [self.options[name] for name in ("fused", "foreach", "differentiable")]
        if asked[0] is not None:
            return bool(asked[0])
        return not any(asked) and all(
            p.is_floating_point() and p.device.type in ("cpu", "cuda") and _is_packed(p)
            for p in parameters
        )

    def init(self, p: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before any step."""
        step = torch.zeros((), dtype=torch.float32, device=counter_device(p))
        return {"step": step, **{name: torch.zeros_like(p) for name in self.state_names()}}

    def step(
        self, parameters: Sequence[Tensor], group: Group, state: State, unless: Tensor | None
    ) -> None:
        """Move parameters of one group that have a gradient.

        Args:
            parameters: Parameters of ``group``.
            group: Their group.
            state: State of the optimizer, made where there is none.
            unless: Truth value on the device: if it is true, nothing changes.
        """
        moved, names = [p for p in parameters if p.grad is not None], self.state_names()
        for p in moved:
            entry = state[p]
            if "exp_avg" not in entry:
                entry |= self.init(p)
            for name in names:
                entry[name] = _like(p, entry[name])
            if entry["step"].dtype != torch.float32:  # kernels take no other
                entry["step"] = entry["step"].to(torch.float32)
        options = self.options
        own = group["adamw"]
        decay = group["weight_decay"] if own["weight_decay"] is None else own["weight_decay"]
        # A fused kernel takes neither complex ones nor views.
        for some in grouped(moved, lambda p: p.is_complex() or not _is_packed(p)):
            states = [state[p] for p in some]
            is_fused = self.is_fused(some)
            adamw(
                [local(p) for p in some],
                [_like(local(p), local(p.grad)) for p in some if p.grad is not None],
                [local(s["exp_avg"]) for s in states],
                [local(s["exp_avg_sq"]) for s in states],
                [local(s["max_exp_avg_sq"]) for s in states if options["amsgrad"]],
                [s["step"] for s in states],
                foreach=options["foreach"] if not is_fused else None,
                capturable=options["capturable"] or all(p.is_cuda for p in some),
                differentiable=options["differentiable"],
                fused=is_fused or None,
                found_inf=None if unless is None else unless.float(),
                has_complex=any(p.is_complex() for p in some),
                amsgrad=options["amsgrad"],
                beta1=options["betas"][0],
                beta2=options["betas"][1],
                lr=own["lr_ratio"] * group["lr"],
                weight_decay=decay,
                eps=options["eps"],
                maximize=False,
            )


def check_rates(rates: Any) -> None:
    """Raise ``ValueError`` unless it is what :meth:`Fallback.for_group` gives."""
    if not isinstance(rates, Mapping) or rates.keys() != {"lr_ratio", "weight_decay"}:
        raise ValueError(f"adamw: expected lr_ratio and weight_decay, got {rates!r}")
    in_range("lr_ratio", rates["lr_ratio"], 0.0, float("inf"))
    if rates["weight_decay"] is not None:
        in_range("weight_decay", rates["weight_decay"], 0.0, float("inf"))


def _ratio(rate: Any, lr: Any) -> float:
    """AdamW's rate over that of a group."""
    if float(rate) == 0.0:
        return 0.0
    if float(lr) == 0.0:
        raise ValueError("adamw: expected a group rate lr > 0 beside an lr of its own, got 0")
    return float(rate) / float(lr)


def adamw_directions(
    grads: list[Tensor], states: Sequence[Mapping[str, Tensor]], options: Mapping[str, Any]
) -> list[Tensor]:
    """What AdamW adds to parameters at a rate of one, without weight decay; moves the averages.

    Args:
        grads: Gradients.
        states: Averages ``exp_avg`` and ``exp_avg_sq`` and the ``step`` of each.
        options: Options of AdamW.
    """
    steps = [torch.zeros_like(g) for g in grads]
    adamw(
        steps,
        grads,
        [s["exp_avg"] for s in states],
        [s["exp_avg_sq"] for s in states],
        [],
        [s["step"] for s in states],
        amsgrad=False,
        beta1=options["betas"][0],
        beta2=options["betas"][1],
        lr=1.0,
        weight_decay=0.0,
        eps=options["eps"],
        maximize=False,
        capturable=all(g.is_cuda for g in grads),
    )
    return steps


def _is_packed(p: Tensor) -> bool:
    """Whether the numbers of ``p`` fill a piece of memory, in any order."""
    return p.is_contiguous() or torch.empty_like(p, device="meta").stride() == p.stride()


def _like(p: Tensor, t: Tensor) -> Tensor:
    """``t`` in the data type of ``p`` and, as fused kernels expect, in its order in memory."""
    if t.dtype == p.dtype and (t.stride() == p.stride() or not _is_packed(p)):
        return t
    return torch.empty_like(p, device=t.device).copy_(t)
