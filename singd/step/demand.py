"""What the factors of a matrix need, and what a rank has of those that ranks share."""

from __future__ import annotations

import math

from singd.capture.statistics import Side, Statistic
from singd.capture.weight_matrix import WeightMatrix
from singd.methods.base import Factors, Method, Options
from singd.ops.parts import Part
from singd.ops.reference import Indices
from singd.ops.storage import FORMS
from singd.placement import Demand


def demand_of(method: Method, matrix: WeightMatrix, factors: Factors, group: Options) -> Demand:
    """What the factors of a matrix need, in numbers and operations.

    The numbers of the factors that are given do not matter.
    """
    sides = list(factors.members().values())[:2]
    counts = [sum(t.numel() for t in side.tensors()) for side in sides]
    sent = [sum(s.numel() for s in Statistic(side).summands()) for side in sides]
    P, item = math.prod(matrix.shape), matrix.weight.element_size()
    pairs = list(zip(counts, sides, strict=True))
    separable = _separable(method, factors, group, "grad", whole=True)
    return Demand(
        numbers=P,
        statistics=sum(sent) * max(item, 4) if method.needs_activations else 0,
        itemsize=item,
        apply=sum(2.0 * count * P / max(side.n, 1) for count, side in pairs),
        update=sum(6.0 * count * side.n for count, side in pairs),
        interval=group["T"],
        needs_factors=method.needs_factors(factors, group),
        is_split=method.is_split and method.speaks_for("apply_input", "apply_grad"),
        mixed_rows=method.mixed_rows(factors) if method.speaks_for("mixed_rows") else None,
        separable=separable,
        scattered=counts[1] * max(item, 4) if separable else 0,
        unscattered=sent[1] * max(item, 4) if separable else 0,
        update_grad=6.0 * counts[1] * sides[1].n if separable else 0.0,
        blocks=(
            _separable(method, factors, group, "input", whole=matrix.bias is not None),
            _separable(method, factors, group, "grad", whole=False),
        ),
        sides=(sent[0] * max(item, 4), sent[1] * max(item, 4)),
    )


def _separable(
    method: Method, factors: Factors, group: Options, side: Side, *, whole: bool
) -> int | None:
    """How many rows of a factor are blocks of it, if they are updated and stored alone."""
    forms = method.storage(factors, group)
    if any(forms.get(name) in FORMS for name in method.members_of.get(side, ())):
        return None  # neighbours share a scale
    return method.separable(factors, side, group, whole=whole)


def cut(factors: Factors, part: Part, method: Method) -> Factors:
    """What this rank has of whole factors, views unless the part has a tail."""
    names = method.members_of[part.side]
    return factors.with_members(
        {n: part.of(m) if n in names else m for n, m in factors.members().items()}
    )


def indices_of(factors: Factors, part: Part, method: Method) -> dict[str, list[Indices]]:
    """Where this rank's numbers lie in each tensor of whole factors, of members with parts."""
    whole = factors.members()
    return {n: part.indices(whole[n]) for n in method.members_of[part.side] if n in whole}
