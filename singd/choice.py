"""Structures for a model from the curvature of a few batches, before it is trained."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from singd.capture.weight_matrix import WeightMatrix
from singd.methods.automatic import AUTO, MEASURED, Automatic
from singd.methods.base import Options
from singd.methods.budget import STATE, check_budget, choose
from singd.methods.covariances import CountedCovariances
from singd.methods.options import integer
from singd.methods.structure_choice import CANDIDATES, StructureChoice
from singd.optimizer import KroneckerOptimizer
from singd.singd import SINGD
from structured import parse

RULE = (
    *("kfac_like", "relative_damping", "scale_init", "alpha1", "lr_cov", "factor_clip"),
    *("normalize_lr_cov", "keep_products", "preconditioner_dtype", "wide_structure"),
)
"""Options of SINGD whose defaults flops, and bytes sent, are counted by."""


class _Measuring(Automatic):
    """Averages the curvature and never chooses."""

    def __init__(self) -> None:
        self.averages: Mapping[WeightMatrix, CountedCovariances] = {}
        self.told: Any = ()

    def check(self, options: Options) -> None:
        check_budget(options["budget"])

    def layout(self, options: Options) -> tuple[Any, ...]:
        return ()

    def revise(self, groups: Any, *told: Any) -> Any:
        ((_, self.averages),), self.told = groups, told
        return {}


def choose_structures(
    model: nn.Module,
    losses: Iterable[Tensor],
    *,
    budget: float | Mapping[str, float] = STATE,
    T: int = 10,
    candidates: Sequence[str] = CANDIDATES,
    layers: Collection[type[nn.Module]] | str = (),
    loss_average: str | None = "batch",
    max_dim: int = MEASURED,
) -> StructureChoice:
    """The structures that lose the fewest nats for the numbers that they store.

    >>> losses = (loss_func(model(X), y) for X, y in batches)
    >>> optimizer = SINGD(model, structures=choose_structures(model, losses, budget=1.5))

    A backward pass of every loss averages the curvature of every weight, and structures are chosen
    as ``SINGD(model, structures="auto")`` does after its first updates; see
    :mod:`singd.methods.structure_choice`. The weights are not changed, and gradients are reset.

    Args:
        model: Model; its weights are not changed.
        losses: Losses of a few batches, made one after the other.
        budget: State of SINGD for the weights, with their momentum: a multiple of AdamW's (a float)
            or bytes (an integer); or a mapping with further limits, as in :class:`singd.SINGD`.
        T: Number of steps between two updates of the factors to be, where flops are limited.
        candidates: Specs that are compared on every side; the cheapest are taken in any case.
        layers: Further types to precondition, as in :class:`singd.SINGD`.
        loss_average: What the losses are means over, as in :class:`singd.SINGD`.
        max_dim: Size beyond which a side is diagonal.

    Raises:
        TypeError: If ``losses`` is a tensor, or one of them is none or has several numbers.
        ValueError: If there is no loss, none was made after the call (give a generator), ``T`` is
            below 1, or not even the cheapest structures fit the budget.
    """
    if isinstance(losses, Tensor):
        raise TypeError("losses: expected several losses, made one after the other, got a tensor")
    integer("T", T, 1)
    if isinstance(candidates, str) or not candidates:
        raise ValueError(f"candidates: expected one spec or more, got {candidates!r}")
    for spec in candidates:
        parse(spec)
    method = _Measuring()
    options = {"T": 1, "structures": AUTO, "budget": budget, "max_dim": max_dim}
    options |= {"loss_average": loss_average}
    optimizer = KroneckerOptimizer(model, method, None, options, layers=layers)
    count = 0
    with optimizer:
        for count, loss in enumerate(losses, 1):  # noqa: B007  # counted
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                kind = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise TypeError(f"losses: expected tensors of one number, got {kind}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.precondition()
        optimizer.zero_grad()
    if not count:
        raise ValueError("losses: expected at least one, got none")
    seen = {m: both for m, both in method.averages.items() if both.batches()}
    if not seen:
        raise ValueError(
            "losses: expected finite passes through supported layers, made one after the other "
            "(a generator), got none that reached a weight"
        )
    (group,) = optimizer.param_groups
    given = inspect.signature(SINGD).parameters
    rule = {name: given[name].default for name in RULE}
    return choose([({**group, **rule, "T": T}, seen)], candidates, *method.told, strict=True)
