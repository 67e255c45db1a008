"""Floating-point operations of a step: methods are run on the meta device, where they are counted.

Statistics are not among them: they grow with the batch, as a layer's passes do. Those of a dense
side of size n beside one of size d take ``n / (3 d T)`` of what the passes take.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from singd.capture.statistics import NoColumns, Side, Statistic, side_by_side
from singd.methods.base import Averages, Method, Options, Stack
from structured import Structure, cost_of


@dataclass(frozen=True)
class Flops:
    """Floating-point operations for one matrix, two for a multiply-add.

    Attributes:
        update: Those of an update of the factors, and of what is cached of them.
        direction: Those of a direction.
        interval: Steps between two updates.
    """

    update: float
    direction: float
    interval: int

    def in_step(self, share: float = 1.0) -> float:
        """Those of a step, on average, of a rank that makes so much of the direction."""
        return self.direction * share + self.update / self.interval


UNKNOWN = Flops(math.nan, math.nan, 1)


def flops_of(
    method: Method,
    shape: Sequence[int],
    structures: Sequence[Structure],
    options: Options,
    dtype: torch.dtype,
) -> Flops:
    """What the method does for one matrix; nothing is allocated.

    Unknown is what a method does that asks for the numbers themselves. Arguments are those of
    :meth:`Method.init`.
    """
    like: dict[str, Any] = {"dtype": dtype, "device": "meta"}
    G = torch.empty(1, *shape, **like)
    try:
        one = method.init(shape, structures, options, **like)
        many = method.init(shape, structures, options, batch_shape=(1,), **like)
        statistics: Any = G
        if method.needs_activations:
            *inner, d_out, d_in = shape

            def of(side: Side, n: int) -> Statistic:
                columns = NoColumns(torch.empty(*inner, n, n, **like))  # as many as make S full
                return side_by_side([method.summarize(one, side, columns, options)])

            statistics = Averages(of("input", d_in), of("grad", d_out))
        products = method.products(many, options)

        def update(step: int) -> None:
            stack = Stack(many, statistics, products)
            (new,) = method.update_all([stack], options, step)
            method.products(new, options)

        updated = sum(
            share * cost_of(functools.partial(update, step)).multiply_adds
            for step, share in method.typical_steps(options).items()
        )
        applied = cost_of(lambda: method.precondition(many, G, products)).multiply_adds
    except (RuntimeError, NotImplementedError):  # as numbers on the meta device raise
        return UNKNOWN
    return Flops(2.0 * updated, 2.0 * applied, options["T"])
