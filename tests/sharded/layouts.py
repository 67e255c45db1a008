"""Ways to shard a model over the four ranks of a world."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

RANKS = 4


@dataclass(frozen=True)
class Layout:
    """How a model is sharded, and which share of the samples this rank has.

    Args:
        mesh: Mesh of the ranks that share the data; other ranks of the world have their own.
        ranks: Number of its ranks.
        leaves: Shard every child in a group of its own, or all parameters in one.
    """

    mesh: DeviceMesh
    leaves: bool = True

    @property
    def ranks(self) -> int:
        return self.mesh.size()

    @property
    def rank(self) -> int:
        """The number of this rank among those that share the data."""
        number = 0
        for dim in range(self.mesh.ndim):
            number = number * self.mesh.size(dim) + self.mesh.get_local_rank(dim)
        return number

    def shard(self, model: nn.Module, **options: Any) -> nn.Module:
        """Shard a model in place, and return it."""
        for child in model.children() if self.leaves else ():
            if any(True for _ in child.parameters()):
                fully_shard(child, mesh=self.mesh, **options)
        fully_shard(model, mesh=self.mesh, **options)
        return model


NAMES = ("4 ranks", "4 ranks, one group", "2 ranks", "2 by 2 ranks")


@dataclass(frozen=True)
class Context:
    """What every case is given: all layouts by :data:`NAMES`, and a folder that ranks share."""

    layouts: dict[str, Layout]
    single: DeviceMesh  # of this rank alone
    meshes: dict[str, DeviceMesh]  # for tensor parallelism
    folder: Path


def begin(folder: Path) -> Context:
    """Called once by every rank."""
    line = init_device_mesh("cpu", (RANKS,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    single = init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("ranks", "single"))["single"]
    meshes = {
        f"{n} by {RANKS // n}": init_device_mesh(
            "cpu", (n, RANKS // n), mesh_dim_names=("data", "tensor")
        )
        for n in (1, 2)
    }
    made = Layout(line), Layout(line, leaves=False), Layout(square["shard"]), Layout(square)
    return Context(dict(zip(NAMES, made, strict=True)), single, meshes, folder)
