"""Which rank works on the factors of which matrix, and what it sends for that."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from singd.capture.weight_matrix import WeightMatrix
from singd.methods.options import by_name
from singd.ops.dtensor import local
from singd.ops.parts import Part
from singd.placement.columns import has_rows
from singd.placement.exchange import box_of
from singd.placement.places import Demand, choose, owners
from singd.placement.shards import Shard, shard_of
from singd.placement.splits import Split, ends_of, split_of


class Assignment:
    """The places of matrices, which stay once they are chosen.

    Args:
        data: Process groups of the ranks that see different samples.
        given: A place for all matrices, or places by patterns of parameter names; the cheapest if
            ``None``.

    Attributes:
        layouts: What the factors of every matrix depend on that is preconditioned.
        owners: The ranks that alone have the factors of a matrix, within the process group that
            splits it.
        splits: How parameters are split, of those that are over one process group.
        parts: What this rank has of factors that ranks share.
        shards: Of matrices that tensor parallelism splits, and whose factors are split likewise.
    """

    def __init__(self, data: Sequence[Any], given: Any) -> None:
        self.data, self.given = list(data), given
        self.layouts: dict[WeightMatrix, Any] = {}
        self.owners: dict[WeightMatrix, int] = {}
        self.splits: dict[Tensor, Split] = {}
        self.parts: dict[WeightMatrix, Part] = {}
        self.shards: dict[WeightMatrix, Shard] = {}
        self._known: set[Tensor] = set()
        self._demands: dict[WeightMatrix, Demand] = {}
        self._places: dict[WeightMatrix, str] = {}

    def place(
        self, layouts: Mapping[WeightMatrix, Any], demand: Callable[[WeightMatrix], Demand]
    ) -> None:
        """Choose the place of every matrix that has none yet, and the owners among ranks."""
        new = [m for m, layout in layouts.items() if self.layouts.get(m) != layout]
        if not new:
            self.layouts = dict(layouts)
            return
        needs = {matrix: demand(matrix) for matrix in new}
        shards = {m: found for m in new if (found := self._shard(m, needs[m])) is not None}
        self.layouts = dict(layouts)
        for matrix in new:
            self.owners.pop(matrix, None)
            self.parts.pop(matrix, None)
            self.shards.pop(matrix, None)
        for matrix in new:
            needed = needs[matrix]
            fits = has_rows(matrix, [self.split(p) for p in matrix.parameters])
            self._demands[matrix] = replace(
                needed,
                is_split=needed.is_split and fits,
                has_rows=fits and self._ends_blocks(matrix, needed.mixed_rows),
            )
        self._places |= dict.fromkeys(new, "everywhere") | dict.fromkeys(shards, "shards")
        self.shards |= shards
        self.parts |= {matrix: shard.part for matrix, shard in shards.items()}
        groups = {matrix: self.group_of(matrix) for matrix in self._demands}
        shared = next((group for group in groups.values() if group is not None), None)
        if shared is not None:
            ranks = dist.get_world_size(shared)
            split = {m: self._demands[m] for m in new if groups[m] is shared}
            self._places |= choose(split, self.given, ranks)
            owned = {m: d for m, d in self._demands.items() if self._places[m] == "owned"}
            self.owners = owners(owned, ranks, self.owners)
        for matrix in new:
            by_rows = self.split(matrix.weight)
            is_separable = self._places[matrix] == "rows" and self._demands[matrix].separable
            if by_rows is not None and is_separable:
                ends, me = by_rows.ends, dist.get_rank(by_rows.group)
                self.parts[matrix] = Part("grad", by_rows.group, ends, me, is_scattered=True)

    def foresee(self, demands: Mapping[WeightMatrix, Demand]) -> dict[WeightMatrix, float]:
        """Bytes that this rank would send in a step for matrices whose factors needed this."""
        trial = copy.copy(self)
        for name in ("owners", "parts", "shards", "_demands", "_places"):
            setattr(trial, name, dict(getattr(self, name)))
        trial.place(self.layouts | {m: object() for m in demands}, demands.__getitem__)
        return {matrix: trial.traffic(matrix) for matrix in demands}

    def _shard(self, matrix: WeightMatrix, needed: Demand) -> Shard | None:
        """The shard of this rank, if its factors may be split as tensor parallelism splits it.

        Raises:
            ValueError: If that was asked for, and the structure does not fit.
        """
        wanted = by_name(self.given, matrix.name)
        if wanted not in (None, "shards"):
            return None
        found = shard_of(matrix, self.data, needed.blocks)
        if isinstance(found, str):
            if wanted == "shards":
                raise ValueError(f"{matrix.name}: places='shards' expects {found}")
            return None
        return found

    def _ends_blocks(self, matrix: WeightMatrix, size: int | None) -> bool:
        """Whether the rows of every rank are blocks of a size, or the last ones."""
        split, rows = self.split(matrix.weight), matrix.shape[-2]
        if size is None or split is None:
            return False
        return all(end % size == 0 or end == rows for end in split.ends)

    def group_of(self, matrix: WeightMatrix) -> Any:
        """The process group by which all parameters of a matrix are split, if there is one."""
        groups = set()
        for p in matrix.parameters:
            split = self.split(p)
            groups.add(None if split is None else split.group)
        group = groups.pop()
        return group if not groups and group in self.data else None

    def split(self, p: Tensor) -> Split | None:
        """How a parameter is split; ``None`` if it is whole, or split over several groups."""
        if p not in self._known:
            self._known.add(p)
            found = split_of(p)
            if found is not None:
                self.splits[p] = found
        return self.splits.get(p)

    def place_of(self, matrix: WeightMatrix) -> str:
        """Where the factors of a matrix are worked on."""
        return self._places.get(matrix, "everywhere")

    def holds(self, matrix: WeightMatrix) -> bool:
        """Whether this rank has the factors of a matrix."""
        owner = self.owners.get(matrix)
        return owner is None or owner == dist.get_rank(self.group_of(matrix))

    def traffic(self, matrix: WeightMatrix) -> float:
        """Bytes that this rank sends in a step: gradients, directions, and statistics every T."""
        demand, place = self._demands[matrix], self.place_of(matrix)
        if place == "shards":
            return self._traffic_of_shard(matrix, demand)
        group = self.group_of(matrix)
        me, W = (0, 0) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        sizes = [dist.get_world_size(g) for g in self.data if place != "owned" or g is not group]
        shares = [2 * (n - 1) / n for n in sizes]
        held = [self._part_sizes(matrix, rank) for rank in range(W)]
        statistics, scattered = demand.statistics, 0.0
        if place == "rows":
            numbers = 0
            if matrix in self.parts:  # as many numbers for every rank as for the first
                statistics -= demand.unscattered
                first = self.splits[matrix.weight].ends[0]
                scattered = (
                    first
                    * (demand.separable or 0)
                    * max(demand.itemsize, 4)
                    * (W - 1 + sum(2 * (n - 1) / n for _, n in self._others(group)))
                )
        elif place == "columns":
            rows, d = matrix.shape[-2:]
            mine = held[me] // d if d else 0
            columns = [b - a for a, b in itertools.pairwise((0, *ends_of(d, W)))]
            numbers = held[me] - mine * columns[me] + (rows - mine) * columns[me]
        elif place == "owned":
            is_mine = self.owners[matrix] == me
            numbers = sum(held) - held[me] if is_mine else held[me]
            shares.append((W - 1) / W)
        elif group is not None:
            numbers = (W - 1) * max(held)
        else:  # gathered parameter by parameter
            numbers = sum(p.numel() - local(p).numel() for p in matrix.parameters)
        sums = sum(shares) * statistics + scattered
        return numbers * demand.itemsize + sums / demand.interval

    def _traffic_of_shard(self, matrix: WeightMatrix, demand: Demand) -> float:
        """Gradients of the shard are gathered over ranks by which it is split once more."""
        shard, part = self.shards[matrix], self.parts[matrix]
        numbers = 0
        if shard.rest is not None:
            numbers = (dist.get_world_size(shard.rest.group) - 1) * shard.rest.ends[0] * shard.width
        of = {"input": 0, "grad": 1}[part.side]
        k = demand.blocks[of] or 1
        count, last = divmod(part.size, k)  # halves of symmetric blocks
        held = (count * k * (k + 1) + last * (last + 1)) // 2 * max(demand.itemsize, 4)
        sums = sum(2 * (n - 1) / n for _, n in self._others(None))
        return numbers * demand.itemsize + sums * (demand.sides[1 - of] + held) / demand.interval

    def _others(self, group: Any) -> list[tuple[Any, int]]:
        """Other process groups than one of ranks that see different samples, and their sizes."""
        return [(g, dist.get_world_size(g)) for g in self.data if g is not group]

    def _part_sizes(self, matrix: WeightMatrix, rank: int) -> int:
        """How many numbers of a matrix a rank holds."""
        found = 0
        for p in matrix.parameters:
            split = self.split(p)
            if split is not None:
                box = box_of(matrix, p, split, rank)
                found += math.prod(side.stop - side.start for side in box)
        return found
