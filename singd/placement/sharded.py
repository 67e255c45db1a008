"""Sharded models: every rank holds a part of each parameter, as a DTensor.

Under FSDP2 and HSDP (:func:`torch.distributed.fsdp.fully_shard`) and tensor parallelism.
Statistics are added up over the ranks that see different samples. Where the factors of a matrix are
worked on is its place, see :mod:`singd.placement.places`; wherever that is, each rank ends with its
part of the direction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from singd.capture.statistics import KroneckerStatistics
from singd.capture.weight_matrix import WeightMatrix, stack_gradients, stack_parts
from singd.ops.dtensor import is_distributed, local, whole
from singd.ops.parts import Part
from singd.placement.assignment import Assignment
from singd.placement.base import Made, Statistics, Work
from singd.placement.exchange import Exchange
from singd.placement.local import LocalHolding, group_places
from singd.placement.mesh import largest_mesh
from singd.placement.own import OwnDirections, gradient_of
from singd.placement.places import Demand
from singd.placement.replicated import DataParallel, sum_
from singd.placement.splits import Split, gathered
from singd.placement.storage import Item, spread
from singd.placement.sums import complete_traces, reduce_owned_, scatter, sent_to


class Sharded(OwnDirections, DataParallel):
    """Every rank holds a part of each parameter.

    Args:
        model: Model whose parameters are sharded.
        data: Process groups of the ranks that see different samples, one for each dimension of
            their mesh.
        places: A place for all matrices, or places by patterns of parameter names; the cheapest if
            ``None``.
        averages_gradients: Whether gradients are still to be averaged over ranks by which a
            parameter is not sharded.
    """

    has_shards = True

    def __init__(
        self, model: nn.Module, data: Sequence[Any], places: Any, averages_gradients: bool
    ) -> None:
        super().__init__(data, averages_gradients)
        mesh = largest_mesh(model)
        by_name = {group.group_name: group for group in [*mesh.get_all_groups(), *data]}
        self.all_groups = list(by_name.values())
        names = {group.group_name for group in data}
        self.same_samples = [g for g in self.all_groups if g.group_name not in names]
        self.has_others = self.has_others or bool(self.same_samples)
        self.device = torch.device(mesh.device_type)
        self._assigned = Assignment(data, places)
        self._modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
        self._whole: dict[WeightMatrix, list[Tensor]] = {}
        self._exchanges: dict[tuple[WeightMatrix, ...], Exchange] = {}

    def place(
        self, layouts: Mapping[WeightMatrix, Any], demand: Callable[[WeightMatrix], Demand]
    ) -> None:
        """Choose the place of every matrix that has none yet, and the owners among ranks."""
        self._assigned.place(layouts, demand)

    def place_of(self, matrix: WeightMatrix) -> str:
        """Where the factors of a matrix are worked on."""
        return self._assigned.place_of(matrix)

    def owner_of(self, matrix: WeightMatrix) -> int | None:
        """The rank that alone has the factors, within the process group that splits the matrix."""
        return self._assigned.owners.get(matrix)

    def part_of(self, matrix: WeightMatrix) -> Part | None:
        """The rows that this rank has of a factor, if ranks share it."""
        return self._assigned.parts.get(matrix)

    def holds(self, matrix: WeightMatrix) -> bool:
        """Whether this rank has the factors of a matrix."""
        return self._assigned.holds(matrix)

    def traffic(self, matrix: WeightMatrix) -> float:
        """Bytes that this rank sends in a step: gradients, directions, and statistics every T."""
        return self._assigned.traffic(matrix)

    def foresee(self, demands: Mapping[WeightMatrix, Demand]) -> dict[WeightMatrix, float]:
        """Bytes that this rank would send in a step for matrices whose factors needed this."""
        return self._assigned.foresee(demands)

    def prepare(self) -> None:
        """Let modules have their sharded parameters, which a pass without a backward leaves whole.

        They would compute with whole parameters of before the step afterwards.
        """
        for module in self._modules:
            module.reshard()

    def is_reducing(self) -> bool:
        """Whether :meth:`set_requires_gradient_sync` has not been told otherwise."""
        states = (module._get_fsdp_state() for module in self._modules)
        groups = (g for s in states for g in getattr(s, "_fsdp_param_groups", ()))
        return all(getattr(group, "reduce_grads", True) for group in groups)

    # A step -------------------------------------------------------------------------------------

    def reduce(self, statistics: Statistics) -> Statistics:
        """The sums over all ranks, of a matrix with an owner on that rank alone.

        Of a factor that ranks share, each has the sums of its part.
        """
        assigned, groups = self._assigned, self.groups
        owned = {m: one for m, one in statistics.items() if m in assigned.owners}
        scattered = {m for m, part in assigned.parts.items() if part.is_scattered}
        parts = {m: one for m, one in statistics.items() if m in scattered}
        shared = {m: s for m, s in statistics.items() if m not in owned and m not in parts}
        found = complete_traces(super().reduce(shared), assigned.parts)
        if parts:
            found |= self.count(scatter(parts, assigned.parts, assigned.splits, groups))
        if owned:
            reduce_owned_(owned, assigned.owners, assigned.group_of(next(iter(owned))), groups)
            found |= {m: one for m, one in self.count(owned).items() if self.holds(m)}
        return {m: found[m] for m in statistics if m in found}

    def send(self, matrix: WeightMatrix, one: KroneckerStatistics) -> KroneckerStatistics:
        """The sums over all ranks, on the owner; others keep counts alone."""
        owner = self._assigned.owners[matrix]
        return sent_to(owner, one, self._assigned.group_of(matrix), self.groups)

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Average gradients over the ranks that :func:`fully_shard` has not averaged them over.

        They are placed like their parameters then, and owners have those of their matrices whole.
        """
        for p in parameters:
            if p.grad is None:
                continue
            _place_gradient(p)
            places = group_places(p)
            left = [group for group in self.groups if group.group_name not in places]
            if left and self.averages_gradients:
                count = math.prod(dist.get_world_size(group) for group in left)
                sum_(local(p.grad), left).div_(count)
        self._whole = {}
        for matrices, like in self._by_dtype(self._travelling):
            self._whole |= self._exchange(matrices).to_owners(self._held_gradient, like)

    @property
    def _travelling(self) -> list[WeightMatrix]:
        """The matrices with owners that have a gradient."""
        return [m for m in self._assigned.layouts if m in self._assigned.owners and m.has_gradient]

    def _by_dtype(
        self, matrices: Sequence[WeightMatrix]
    ) -> list[tuple[list[WeightMatrix], Tensor]]:
        """Matrices by the data type of their gradients, each with a tensor of it."""
        found: dict[Any, tuple[list[WeightMatrix], Tensor]] = {}
        for matrix in matrices:
            grad = next(local(p.grad) for p in matrix.parameters if p.grad is not None)
            found.setdefault(grad.dtype, ([], grad))[0].append(matrix)
        return list(found.values())

    def _exchange(self, matrices: Sequence[WeightMatrix]) -> Exchange:
        key = tuple(matrices)
        if key not in self._exchanges:
            self._exchanges[key] = Exchange(matrices, self._assigned.owners, self._assigned.splits)
        return self._exchanges[key]

    def directions(
        self,
        works: Iterable[Work],
        alike: Iterable[Sequence[WeightMatrix]],
        *,
        with_gradients: bool,
    ) -> Iterator[Made]:
        """What this rank holds of all directions; those of owners come back by one exchange."""
        whole: dict[WeightMatrix, list[Tensor]] = {}
        by_columns: list[Work] = []
        of_shards: list[Work] = []
        for work in works:
            if work.matrices[0] in self._assigned.owners:
                values = work.apply(self.gradients(work.matrices))
                whole |= {m: m.split(t) for m, t in zip(work.matrices, values, strict=True)}
            elif self._assigned.place_of(work.matrices[0]) == "rows":
                yield self._of_rows(work)
            elif self._assigned.place_of(work.matrices[0]) == "columns":
                by_columns.append(work)
            elif self._assigned.place_of(work.matrices[0]) == "shards":
                of_shards.append(work)
            else:
                yield from super().directions([work], (), with_gradients=with_gradients)
        yield from self._of_columns(by_columns)
        yield from self._of_shards(of_shards)
        held: dict[tuple[WeightMatrix, Tensor], Tensor] = {}
        for matrices, like in self._by_dtype(self._travelling):
            held |= self._exchange(matrices).from_owners(whole, like)
        self._whole = {}
        for each in alike:
            owned = [matrix for matrix in each if matrix in self._assigned.owners]
            for matrices, _ in self._by_dtype(owned):
                holding = self.make_holding(matrices)
                direction = holding.joined(lambda slot: held[slot.matrix, slot.parameter])
                gradient = holding.joined(gradient_of) if with_gradients else None
                yield Made(matrices, holding, gradient, direction)

    def gradients(self, matrices: Sequence[WeightMatrix]) -> Tensor:
        """Whole gradients of equal matrices, ``[matrices, ..., d_out, d_in]``."""
        if matrices[0] in self._assigned.owners:
            return stack_parts(matrices, [self._whole[matrix] for matrix in matrices])
        found: dict[Tensor, Tensor] = {}
        packs: dict[Any, list[tuple[Tensor, Tensor, Split]]] = {}
        for p in {p: None for matrix in matrices for p in matrix.parameters}:
            split = self._assigned.split(p)
            if p.grad is not None and split is None:
                found[p] = whole(p.grad)
            elif p.grad is not None and split is not None:
                packs.setdefault(split.group, []).append((p, p.grad, split))
        for pack in packs.values():
            parameters, grads, splits = zip(*pack, strict=True)
            found |= zip(parameters, gathered(grads, splits), strict=True)
        return stack_gradients(matrices, found)

    def spread(self, items: Sequence[Item]) -> list[Tensor]:
        """Tensors of owners, and parts of factors that ranks share, as DTensors along rows."""
        return spread(items, self._assigned.owners, self._assigned.parts, self._assigned.group_of)

    def agree(self, numbers: Sequence[float | Tensor], like: Tensor) -> list[float]:
        """The sums over ranks that see different samples, and the most of those that do not."""
        found = torch.tensor(super().agree(numbers, like), dtype=torch.float64, device=self.device)
        for group in self.same_samples:
            dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
        return [float(n) for n in found.tolist()]

    def complete(self, sums: Tensor) -> Tensor:
        """The sums over all ranks."""
        return sum_(sums.to(self.device), self.all_groups)

    def complete_norms(self, norms: Tensor) -> Tensor:
        """The roots of the sums over all ranks of squares."""
        return self.complete(norms.double().square()).sqrt().to(norms.dtype)

    def make_holding(self, matrices: Sequence[WeightMatrix]) -> LocalHolding:
        """The parts that this rank holds."""
        return LocalHolding(matrices, self.all_groups)


def _place_gradient(p: Any) -> None:
    """Give a gradient the placement of its parameter."""
    if is_distributed(p) and p.grad.placements != p.placements:
        p.grad = p.grad.redistribute(placements=p.placements)
