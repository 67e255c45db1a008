"""From statistics to factors: what units saw, averaged bucket by bucket and handed to a rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from singd import distributed
from singd.capture import Form, Statistics, Unit
from singd.grouping import Bucket, Members, Products
from singd.rounding import Rounding
from singd.update import curvature, product_residual, residual
from structured import StructuredMatrix

if TYPE_CHECKING:
    from singd.base import KroneckerOptimizer


@dataclass
class Proposal:
    """What a bucket will hold if the step is taken."""

    bucket: Bucket
    members: Members
    products: Products
    updated: list[Unit]  # the units whose factors are new


@dataclass
class Job:
    """Units of a bucket whose factors are due, and what was seen of them."""

    old: Members
    products: Products
    sums: dict[str, StructuredMatrix]  # by side, averages over rows
    forms: dict[str, Form]


def propose(
    optimizer: KroneckerOptimizer,
    buckets: Sequence[Bucket],
    scale: Tensor | None,
    report: dict[str, Any] | None,
) -> list[Proposal]:
    """Update the factors that are due, not in place.

    Args:
        optimizer: Whose rule it is.
        buckets: Of all units.
        scale: Of the loss, if its gradients are free of it and the statistics are not.
        report: Takes how far factors are from the best ones, by unit, if anybody wants to know.
    """
    proposals: list[Proposal] = []
    due: dict[int, list[Proposal]] = {}  # by group
    for bucket in buckets:
        group = bucket.units[0].group
        products = bucket.products or optimizer._products(group, bucket.members)
        units = [u for u in bucket.units if u.complete and optimizer._due(u)]
        proposals.append(Proposal(bucket, bucket.members, products, units))
        if units:
            due.setdefault(id(group), []).append(proposals[-1])

    def terms(unit: Unit, seen: Statistics) -> float | Tensor:
        counted = _terms(optimizer, unit, seen)
        return counted if scale is None else counted / scale.double().square()

    for changing in due.values():
        group = changing[0].updated[0].group
        jobs = (_job(proposal, terms, report) for proposal in changing)
        for proposal, new in zip(changing, optimizer._update(group, jobs), strict=True):
            stream = buckets.index(proposal.bucket)
            rounding = Rounding(group["seed"], group["step"], stream)
            proposal.members = proposal.bucket.replaced(proposal.updated, new, rounding)
            proposal.products = optimizer._products(group, proposal.members)
    return proposals


def _terms(optimizer: KroneckerOptimizer, unit: Unit, seen: Statistics) -> float | Tensor:
    """What multiplies ``sum g g^T``: how many terms the loss is a mean over."""
    terms = optimizer._passes.terms
    if not isinstance(terms, Tensor) and not terms:
        counts = {None: 1, "batch": seen.samples, "batch+sequence": seen.terms}
        terms = counts[unit.group["loss_average"]]
    return terms / distributed.size(optimizer._process_group) ** 2


def _job(
    proposal: Proposal,
    terms: Callable[[Unit, Statistics], float | Tensor],
    report: dict[str, Any] | None,
) -> Job:
    """What the units of a bucket saw, averaged."""
    units, damping = proposal.updated, proposal.updated[0].group["damping"]
    old, kept = proposal.bucket.select(units, proposal.members, proposal.products)
    job = Job(old, kept, {}, {})
    sums: dict[str, Callable[[Unit, Statistics], tuple[StructuredMatrix, float | Tensor]]] = {
        "K": lambda _, seen: (seen.U_K, 1.0 / seen.rows),
        "C": lambda unit, seen: (seen.U_C, terms(unit, seen)),
    }
    for side, of_side in sums.items():
        job.sums[side], job.forms[side] = joined(units, side, old, kept, of_side)
        if report is not None and side in old:
            for unit, norm in zip(units, _residuals(job, side, damping), strict=True):
                report.setdefault(unit.name, {})[f"residual_{side}"] = norm
    return job


def joined(
    units: Sequence[Unit],
    side: str,
    old: Members,
    products: Products,
    sums: Callable[[Unit, Statistics], tuple[StructuredMatrix, float | Tensor]],
) -> tuple[StructuredMatrix, Form]:
    """The averages of units side by side, in one form; so the parts of layers that have some.

    Args:
        units: Of one bucket.
        side: ``"K"`` or ``"C"``.
        old: Their factors.
        products: Of them.
        sums: The sum of a side that was seen of a part of a unit, and what makes it an average.
    """
    form: Form = next((u.forms[side] for u in units if u.forms.get(side, "S") != "S"), "S")

    def average(index: int, unit: Unit) -> StructuredMatrix:
        parts = [sums(unit, seen) for _, seen in sorted(unit.statistics.items())]
        first, *others = [U * scale for U, scale in parts]
        if others:
            U = first.map(lambda *ts: torch.stack(ts)[None], *others)
        else:
            U = first.map(lambda t: t[None])
        if unit.forms.get(side, "S") == form:
            return U
        source = old[side] if form == "H" else products[2 * side]
        own = source.map(lambda t: t[index, None])
        return curvature(own.to(U.dtype), U) if form == "H" else own.matmul(U.to(own.dtype))

    first, *others = [average(index, unit) for index, unit in enumerate(units)]
    return first.map(lambda *ts: torch.cat(ts), *others) if others else first, form


def _residuals(job: Job, side: str, damping: float) -> Tensor:
    """How far every factor of a side is from the best one, ``[units, ...]``."""
    U, form = job.sums[side], job.forms[side]
    if form == "PS":
        return product_residual(job.products[2 * side], U, damping)
    K = job.old[side].to(U.dtype)
    return residual(K, U if form == "H" else curvature(K, U), damping)
