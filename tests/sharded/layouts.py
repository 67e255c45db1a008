"""Ways to shard a model over the four ranks of a world."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from singd.testing.sharded.setting import Layout

RANKS = 4


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
