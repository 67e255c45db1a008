"""From statistics to factors: sums become averages, batch by batch, and go to the method."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from singd.capture.statistics import KroneckerStatistics, side_by_side
from singd.capture.weight_matrix import WeightMatrix
from singd.methods.base import Averages, Method, Stack
from singd.ops.grouping import grouped
from singd.ops.stochastic_rounding import Rounding
from singd.placement import Placement, Statistics
from singd.step.batch import Batch, Proposal
from singd.step.factor_store import FactorStore
from singd.step.groups import Group, is_due

Residuals = dict[WeightMatrix, dict[str, Tensor]]


@dataclass
class Normalization:
    """What makes averages of sums.

    Attributes:
        counted: Number of terms that the user counted for this step; 0 if none.
        scale: Scale of the loss that statistics are not free of, by a GradScaler.
        ranks: Number of ranks that share the data: each has the gradient of its own mean.
    """

    counted: float | Tensor
    scale: Tensor | None
    ranks: int

    def of_gradients(self, one: KroneckerStatistics, group: Group) -> float | Tensor:
        """What multiplies ``sum g g^T``: how many terms the loss is a mean over."""
        terms = self.counted
        if not isinstance(terms, Tensor) and not terms:
            counts = {None: 1, "batch": one.samples, "batch+sequence": one.loss_terms}
            terms = counts[group["loss_average"]]
        terms = terms / self.ranks**2
        return terms if self.scale is None else terms / self.scale.double().square()


def update_factors(
    store: FactorStore,
    placement: Placement,
    statistics: Statistics,
    normalization: Normalization,
    residuals: Residuals | None,
) -> list[Proposal]:
    """The factors of all batches, those that are due updated; nothing is written.

    Args:
        store: The factors of all matrices.
        placement: Gives whole gradients to a method that needs no activations.
        statistics: Sums over all ranks.
        normalization: What makes averages of them.
        residuals: Takes how far factors were from where they rest; not computed if ``None``.
    """
    proposals = [
        Proposal(batch, batch.stored, store.products(batch), []) for batch in store.batches
    ]
    every = [
        (proposal, some)
        for proposal in proposals
        if is_due(proposal.batch.group)
        for some in _due(store.method, proposal.batch, statistics)
    ]
    for due in grouped(every, lambda each: id(each[0].batch.group)):
        group = due[0][0].batch.group
        rounding = Rounding(group["seed"], group["step"])
        stacks = (
            _job(store.method, placement, proposal, some, statistics, normalization, residuals)
            for proposal, some in due
        )
        updates = store.method.update_all(stacks, group, group["step"])
        for (proposal, some), new in zip(due, updates, strict=True):
            before = proposal.stored  # others of the batch may have been updated already
            proposal.stored = proposal.batch.replaced(some, new, rounding, before)
            proposal.updated += some
        for proposal, _ in due:
            proposal.products = store.products_of(proposal.stored, group)
    return proposals


def _due(method: Method, batch: Batch, statistics: Statistics) -> list[list[WeightMatrix]]:
    """The matrices of a batch with statistics, those of one kind together."""
    if not method.needs_activations:
        some = [matrix for matrix in batch.matrices if matrix.has_gradient]
        return [some] if some else []
    some = [matrix for matrix in batch.matrices if matrix in statistics]
    return grouped(some, lambda m: (statistics[m].input.kind, statistics[m].grad.kind))


def _job(
    method: Method,
    placement: Placement,
    proposal: Proposal,
    some: list[WeightMatrix],
    statistics: Statistics,
    normalization: Normalization,
    residuals: Residuals | None,
) -> Stack:
    """Some matrices of a batch with their factors, and what was seen of them."""
    batch = proposal.batch
    stored, products = batch.select(some, batch.stored, proposal.products)
    factors = stored.factors()
    if not method.needs_activations:
        return Stack(factors, placement.gradients(some), products)
    sums = [statistics[matrix] for matrix in some]
    averages = Averages(
        side_by_side([one.input.scaled(1.0 / one.rows) for one in sums]),
        side_by_side(
            [one.grad.scaled(normalization.of_gradients(one, batch.group)) for one in sums]
        ),
        [one.rows / normalization.ranks for one in sums],
    )
    if residuals is not None:
        found = method.residuals(factors, averages, batch.group)
        for i, matrix in enumerate(some):
            residuals[matrix] = {name: values[i] for name, values in found.items()}
    return Stack(factors, averages, products, None if stored.is_plain else stored.member)
