"""The meshes of a sharded model: over which ranks samples differ, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from singd.ops.dtensor import is_distributed, local


def largest_mesh(model: nn.Module) -> DeviceMesh:
    """The mesh with most dimensions that a parameter is placed on."""
    parameters: list[Any] = [p for p in model.parameters() if is_distributed(p)]
    meshes: list[DeviceMesh] = [p.device_mesh for p in parameters]
    return max(meshes, key=lambda mesh: mesh.ndim)


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
