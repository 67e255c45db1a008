"""Factors taken from an optimizer."""

from __future__ import annotations

from singd.factors.records import KroneckerFactors, WeightFactors, plain
from singd.methods.automatic import measures
from singd.optimizer import KroneckerOptimizer
from structured import parse


def export(optimizer: KroneckerOptimizer) -> KroneckerFactors:
    """Copies of the factors that an optimizer has learned, by the names of the weights.

    >>> factors = singd.export(optimizer)
    >>> factors["0.weight"].K, factors["0.weight"].bias

    SINGD, INGD and IKFAC store roots; those of KFAC are Cholesky factors of its inverses.

    Args:
        optimizer: Optimizer after at least one step.

    Raises:
        TypeError: If it is no optimizer of this package.
        ValueError: If it has not taken a step, its factors mean something else, or another process
            has some of them.
    """
    if not isinstance(optimizer, KroneckerOptimizer):
        raise TypeError(f"optimizer: expected one of singd, got {type(optimizer).__name__}")
    if not any(group["step"] for group in optimizer.param_groups):
        raise ValueError("optimizer: expected one that has taken a step, got a new one")
    names = {p: plain(name) for name, p in optimizer.model.named_parameters()}
    factors = {}
    for stored in optimizer.stored_factors():
        roots = stored.method.roots(stored.factors)
        if roots is None and measures(stored.group):
            raise ValueError(
                "optimizer: expected one that has chosen its structures, got one that still "
                "averages the curvature: take more steps"
            )
        if roots is None:
            kind, name = type(stored.factors).__name__, type(optimizer).__name__
            raise ValueError(
                "optimizer: expected factors that are roots of the inverse curvature, as those of "
                f"SINGD and KFAC, got {kind} of {name}"
            )
        K, C = (root.detach().clone() for root in roots)
        structures = stored.structures or (parse("dense"), parse("dense"))
        bias = stored.matrix.bias
        factors[plain(stored.matrix.key)] = WeightFactors(
            K,
            C,
            (structures[0], structures[1]),
            None if bias is None else names[bias],
            stored.group["kfac_approx"],
            stored.group["step"],
        )
    return KroneckerFactors(factors)
