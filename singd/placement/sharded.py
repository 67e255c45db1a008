"""Sharded models: every rank holds a part of each parameter, as a DTensor.

Under FSDP2 and HSDP (:func:`torch.distributed.fsdp.fully_shard`) and tensor parallelism. Factors
are the same on every rank: statistics are added up over the ranks that see different samples,
gradients are gathered for their direction, and each rank keeps its part of that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from singd.capture.weight_matrix import WeightMatrix, stack_gradients
from singd.ops.dtensor import is_distributed, local, whole
from singd.ops.reference import Indices
from singd.placement.base import Holding, Slot
from singd.placement.replicated import DataParallel, sum_
from singd.placement.splits import Split, gathered, split_of


class LocalSlot(Slot):
    """The numbers of one parameter of a matrix that this rank holds: a box.

    Attributes:
        within: The box in this rank's part of the parameter.
        box: The box in the whole parameter of the matrix.
    """

    within: tuple[slice, ...]
    box: tuple[slice, ...]

    def __init__(self, matrix: WeightMatrix, parameter: nn.Parameter) -> None:
        super().__init__(matrix, parameter)
        shape, offset = _local_box(parameter)
        within = [slice(0, n) for n in shape]
        box = [slice(o, o + n) for o, n in zip(offset, shape, strict=True)]
        if matrix.rows is not None:
            first, end, _ = matrix.rows.indices(parameter.shape[0])
            low = min(max(first, offset[0]), end)
            high = max(low, min(end, offset[0] + shape[0]))
            within[0] = slice(low - offset[0], high - offset[0]) if high > low else slice(0, 0)
            box[0] = slice(low - first, high - first)
        object.__setattr__(self, "within", tuple(within))
        object.__setattr__(self, "box", tuple(box))
        object.__setattr__(self, "indices", _indices(matrix.part_shape(parameter), box))

    @property
    def shape(self) -> torch.Size:
        """The shape of the box."""
        return torch.Size([side.stop - side.start for side in self.box])

    def of(self, t: Tensor) -> Tensor:
        """These numbers of the parameter, or of what is stored like it, a view."""
        return local(t).detach()[self.within]


def _indices(shape: torch.Size, box: Sequence[slice]) -> Indices:
    """The places of the numbers of a box, cut along the first dimension and one other at most."""
    strides = [shape[d + 1 :].numel() for d in range(len(shape))]
    start = sum(side.start * stride for side, stride in zip(box, strides, strict=True))
    for side, n, stride in list(zip(box, shape, strides, strict=True))[:0:-1]:
        if 0 < side.stop - side.start < n:
            return Indices(start, (side.stop - side.start) * stride, n * stride)
    return Indices(start)


def _local_box(p: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of this rank's part of a parameter, and where it begins."""
    if not is_distributed(p):
        return tuple(p.shape), (0,) * p.ndim
    held: Any = p
    shape, offset = compute_local_shape_and_global_offset(
        p.shape, held.device_mesh, held.placements
    )
    if 0 in shape:
        offset = (0,) * p.ndim
    return tuple(shape), tuple(offset)


class LocalHolding(Holding):
    """The parts of equal matrices that this rank holds, one after the other in a vector.

    Those come first which the rank counts.

    Args:
        matrices: Equal matrices.
        groups: Process groups of all ranks, one for each dimension of their mesh.
    """

    def __init__(self, matrices: Sequence[WeightMatrix], groups: Sequence[Any]) -> None:
        self.matrices = list(matrices)
        self._local = [[LocalSlot(m, p) for p in m.parameters] for m in self.matrices]
        every = [slot for slots in self._local for slot in slots]
        first = {slot: _is_first_copy(slot.parameter, groups) for slot in every}
        self._order = sorted(every, key=lambda slot: not first[slot])
        self._sizes = [slot.shape.numel() for slot in self._order]
        self._counts = sum(s.shape.numel() for s in every if first[s])
        self._is_counted: dict[Slot, bool] = {slot: first[slot] for slot in every}

    @property
    def slots(self) -> Sequence[Sequence[Slot]]:
        """Of every matrix those of its parameters."""
        return self._local

    def keep(self, whole: Tensor) -> Tensor:
        """What is held of ``whole [matrices, ..., d_out, d_in]``, a vector."""
        split = [m.split(t) for m, t in zip(self.matrices, whole.unbind(), strict=True)]
        parts = {
            slot: part[slot.box].flatten()
            for slots, parts in zip(self._local, split, strict=True)
            for slot, part in zip(slots, parts, strict=True)
        }
        return torch.cat([parts[slot] for slot in self._order])

    def parts(self, kept: Tensor) -> list[list[Tensor]]:
        """What was kept as views, one for each slot and shaped like it."""
        pieces = zip(self._order, kept.split(self._sizes), strict=True)
        found = {slot: t.view(slot.shape) for slot, t in pieces}
        return [[found[slot] for slot in slots] for slots in self._local]

    def counted(self, kept: Tensor) -> Tensor:
        """What this rank counts: every number is counted by one rank."""
        return kept[: self._counts]

    def is_counted(self, slot: Slot) -> bool:
        """Whether this rank counts the numbers of a slot."""
        return self._is_counted[slot]

    def scale_(self, kept: Tensor, scale: Tensor) -> None:
        """Multiply what is held of every matrix by a number."""
        for parts, number in zip(self.parts(kept), scale, strict=True):
            torch._foreach_mul_(parts, number)


def _is_first_copy(p: Tensor, groups: Sequence[Any]) -> bool:
    """Whether this rank is the first of those that hold the same numbers of a parameter."""
    split = {name for name, placement in _places(p).items() if not placement.is_replicate()}
    return all(group.group_name in split or dist.get_rank(group) == 0 for group in groups)


def _places(p: Any) -> dict[str, Any]:
    """How a parameter is placed over each process group of its mesh, by the group's name."""
    if not is_distributed(p):
        return {}
    return {
        p.device_mesh.get_group(i).group_name: placement for i, placement in enumerate(p.placements)
    }


def largest_mesh(model: nn.Module) -> DeviceMesh:
    """The mesh with most dimensions that a parameter is placed on."""
    parameters: list[Any] = [p for p in model.parameters() if is_distributed(p)]
    meshes: list[DeviceMesh] = [p.device_mesh for p in parameters]
    return max(meshes, key=lambda mesh: mesh.ndim)


class Sharded(DataParallel):
    """Every rank holds a part of each parameter, and all factors.

    Args:
        model: Model whose parameters are sharded.
        data: Process groups of the ranks that see different samples, one for each dimension of
            their mesh.
        averages_gradients: Whether gradients are still to be averaged over ranks by which a
            parameter is not sharded.
    """

    def __init__(self, model: nn.Module, data: Sequence[Any], averages_gradients: bool) -> None:
        super().__init__(data, averages_gradients)
        mesh = largest_mesh(model)
        by_name = {group.group_name: group for group in [*mesh.get_all_groups(), *data]}
        self.all_groups = list(by_name.values())
        self.device = torch.device(mesh.device_type)
        self._splits: dict[Tensor, Split | None] = {}
        self._modules = [m for m in model.modules() if isinstance(m, FSDPModule)]

    def prepare(self) -> None:
        """Let modules have their sharded parameters, which a pass without a backward leaves whole.

        They would compute with whole parameters of before the step afterwards.
        """
        for module in self._modules:
            module.reshard()

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Average gradients over the ranks that :func:`fully_shard` has not averaged them over.

        They are placed like their parameters then.
        """
        for p in parameters:
            if p.grad is None:
                continue
            _place_gradient(p)
            places = _places(p)
            left = [group for group in self.groups if group.group_name not in places]
            if left and self.averages_gradients:
                count = math.prod(dist.get_world_size(group) for group in left)
                sum_(local(p.grad), left).div_(count)

    def gradients(self, matrices: Sequence[WeightMatrix]) -> Tensor:
        """Whole gradients of equal matrices, ``[matrices, ..., d_out, d_in]``."""
        found: dict[Tensor, Tensor] = {}
        packs: dict[Any, list[tuple[Tensor, Tensor, Split]]] = {}
        for p in {p: None for matrix in matrices for p in matrix.parameters}:
            split = self._splits.setdefault(p, split_of(p))
            if p.grad is not None and split is None:
                found[p] = whole(p.grad)
            elif p.grad is not None and split is not None:
                packs.setdefault((split.group, p.grad.dtype), []).append((p, p.grad, split))
        for pack in packs.values():
            parameters, grads, splits = zip(*pack, strict=True)
            found |= zip(parameters, gathered(grads, splits), strict=True)
        return stack_gradients(matrices, found)

    def complete(self, sums: Tensor) -> Tensor:
        """The sums over all ranks."""
        return sum_(sums.to(self.device), self.all_groups)

    def complete_norms(self, norms: Tensor) -> Tensor:
        """The roots of the sums over all ranks of squares."""
        return self.complete(norms.double().square()).sqrt().to(norms.dtype)

    def make_holding(self, matrices: Sequence[WeightMatrix]) -> Holding:
        """The parts that this rank holds."""
        return LocalHolding(matrices, self.all_groups)


def _place_gradient(p: Any) -> None:
    """Give a gradient the placement of its parameter."""
    if is_distributed(p) and p.grad.placements != p.placements:
        p.grad = p.grad.redistribute(placements=p.placements)


# What is sharded how -----------------------------------------------------------------------------


def data_groups(model: nn.Module, data: DeviceMesh | Sequence[str] | None) -> list[Any]:
    """The process groups of the ranks that see different samples.

    Args:
        model: Model whose parameters are sharded.
        data: Mesh of these ranks, or names of dimensions of the parameters' mesh; ``None`` for all
            of them under FSDP2 or HSDP alone.

    Raises:
        ValueError: If dimensions are to be named, or there are none of these names, or parameters
            are kept on another device than they are computed on.
    """
    for name, p in model.named_parameters():
        if is_distributed(p):
            _refuse_offloaded(name, p)
    mesh = largest_mesh(model)
    if isinstance(data, DeviceMesh):
        return list(data.get_all_groups())
    if data is not None:
        known = mesh.mesh_dim_names or ()
        if isinstance(data, str) or not set(data) <= set(known):
            raise ValueError(f"data: expected a mesh or names among {list(known)}, got {data!r}")
        return [mesh.get_group(name) for name in data]
    is_fsdp = any(isinstance(m, FSDPModule) for m in model.modules())
    for name, p in model.named_parameters():
        if is_distributed(p) and not (is_fsdp and _is_fully_sharded(p, mesh)):
            raise ValueError(
                f"{name} is placed as {list(p.placements)} on {p.device_mesh}: expected data, the "  # type: ignore[attr-defined]
                "mesh dimensions over which samples differ (() if there are none)"
            )
    return list(mesh.get_all_groups())


def _is_fully_sharded(p: Any, mesh: DeviceMesh) -> bool:
    """Whether a parameter is placed as FSDP2 (one dimension) or HSDP (two) does."""
    *others, last = p.placements
    replicated = all(other.is_replicate() for other in others)
    return p.device_mesh == mesh and replicated and not last.is_partial()


def _refuse_offloaded(name: str, p: Any) -> None:
    """Raise ``ValueError`` if a parameter is kept on another device than it is computed on."""
    held, computed = local(p).device.type, p.device_mesh.device_type
    if held not in (computed, "meta"):
        raise ValueError(
            f"{name} is kept on {held} and computed on {computed}: offloading of parameters is not "
            "supported"
        )
