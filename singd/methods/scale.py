"""The scale of the curvature: first factors and damping that follow it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from singd import update
from singd.capture.statistics import Statistic
from singd.methods.base import Averages, Options, Stack
from singd.ops import parts
from structured import Diagonal, StructuredMatrix


def needs_trace(options: Options) -> bool:
    """Whether a step depends on the scale of ``S``, not only on ``H``."""
    return bool(options["scale_init"] or options["relative_damping"])


def dampings(averages: Averages, options: Options) -> tuple[Any, Any]:
    """The damping of K and of C: a number, or ``[matrices, ...]`` if it is relative."""
    if not options["relative_damping"]:
        return options["damping"], options["damping"]
    of_K, of_C = averages.input.mean(), averages.grad.mean()
    if not options["kfac_like"]:
        of_K = of_C = of_K * of_C
    return options["damping"] * of_K, options["damping"] * of_C


def measured(averages: Averages, options: Options) -> tuple[Any, Any]:
    """What multiplies the new momenta of K and of C: under relative damping 0 if S is nothing."""
    if not options["relative_damping"]:
        return 1.0, 1.0
    means = averages.input.mean(), averages.grad.mean()
    of_K, of_C = (update.is_measured(mean).to(mean) for mean in means)
    return (of_K, of_C) if options["kfac_like"] else (of_K * of_C.to(of_K),) * 2


def curvature_of(K: StructuredMatrix, U: Statistic) -> tuple[StructuredMatrix, StructuredMatrix]:
    """A factor in the precision of its statistic, and its curvature."""
    wide = torch.promote_types(K.dtype, U.value.dtype)
    K, value = K.to(wide), U.value.to(wide)
    return K, value if U.kind == "whitened" else update.curvature(K, value)


def resolved_damping(c: Any, a: Any, U: Statistic) -> Any:
    """The damping, as much as can be resolved beside the statistic of ``a S``."""
    if U.kind == "whitened" or isinstance(U.value, Diagonal):
        return c
    return update.resolve_damping(c, a, parts.norm(U.value, U.part))


def begun(stack: Stack) -> Stack:
    """The stack with factors that are still the identity scaled to their statistics."""
    averages, factors, products = stack.statistics, stack.factors, dict(stack.products)
    scales: dict[str, Tensor] = {}
    sides = {"input": "K", "grad": "C"}
    for side, name in sides.items():
        K, U = getattr(factors, name), getattr(averages, side)
        scale = update.first_scale(K, U.mean(), functools.partial(parts.max_abs, part=U.part))
        if scale.is_cpu and not torch.compiler.is_compiling() and not bool((scale != 1).any()):
            continue
        factors, scales[name] = replace(factors, **{name: (scale * K).to(K.dtype)}), scale
        if U.kind == "whitened":
            whitened = Statistic(scale.square() * U.value, U.kind, U.trace, U.part)
            averages = replace(averages, **{side: whitened})
        P = products.pop(2 * name, None)
        if isinstance(P, StructuredMatrix):  # other products have no part in an update
            products[2 * name] = (scale.square() * P).to(P.dtype)
    stack.statistics = None
    load = functools.partial(_scaled, stack.load, scales) if stack.load and scales else stack.load
    return Stack(factors, averages, products, load)


def _scaled(
    load: Callable[[str], StructuredMatrix], scales: Mapping[str, Tensor], name: str
) -> StructuredMatrix:
    """A member that is loaded anew, at its scale."""
    K = load(name)
    return (scales[name] * K).to(K.dtype) if name in scales else K


def square_sum(X: Tensor, dtype: torch.dtype) -> Tensor:
    """``tr(X X^T) [...]`` of ``X [..., n, R]``, accumulated in ``dtype``."""
    return torch.linalg.vector_norm(X, dim=(-2, -1), dtype=dtype).square()
