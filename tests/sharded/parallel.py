"""Tensor parallelism, alone, beside data parallelism and under FSDP2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInputOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from singd import SINGD
from singd.state.plan import nbytes
from singd.testing.sharded.rows import snapshot
from singd.testing.sharded.setting import Ends, Setting
from tests.sharded.layouts import Context
from tests.sharded.scenarios import OPTIONS
from tests.singd.runs import F64, batches

ROWS, POSITIONS, STEPS = 6, 4, 4


class Block(nn.Module):
    """A normalization and two layers, of which tensor parallelism splits one each way."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


class Net(nn.Module):
    """Always the same weights."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
            self.one, self.two = Block(), Block()
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.two(self.one(self.first(x))))


PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}
SEQUENCE = {
    "": PrepareModuleInputOutput(
        input_layouts=Replicate(),
        desired_input_layouts=Shard(1),
        output_layouts=Shard(1),
        desired_output_layouts=Replicate(),
    ),
    "norm": SequenceParallel(),
    "up": ColwiseParallel(input_layouts=Shard(1)),
    "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
}


@dataclass(frozen=True)
class Parallel:
    """Tensor parallelism over some ranks, and data parallelism over others.

    Args:
        mesh: Mesh with the dimensions ``"data"`` and ``"tensor"``.
        sequence: Split positions too, between the layers.
        fully: Shard over ``"data"`` by :func:`fully_shard`; otherwise the optimizer averages.
    """

    mesh: DeviceMesh
    sequence: bool = False
    fully: bool = False

    @property
    def ranks(self) -> int:
        return self.mesh["data"].size()

    @property
    def rank(self) -> int:
        return self.mesh["data"].get_local_rank()

    def shard(self, model: Any) -> nn.Module:
        for block in (model.one, model.two):
            parallelize_module(block, self.mesh["tensor"], SEQUENCE if self.sequence else PLAN)
        if self.fully:
            for block in (model.one, model.two):
                fully_shard(block, mesh=self.mesh["data"])
            fully_shard(model, mesh=self.mesh["data"])
        return model

    def data(self) -> Any:
        """The option of the optimizer."""
        if self.fully:
            return ("data",)
        return self.mesh["data"] if self.ranks > 1 else ()


def parallel(context: Context, name: str, option: str) -> Ends:
    """A run on ranks."""
    mesh, *how = KINDS[name]
    used = Parallel(context.meshes[mesh], *how)
    return run(Setting(used, used.ranks), option, data=used.data())


def alone(name: str, option: str) -> Ends:
    """The same in one process."""
    if not option:
        names = [f"{block}.{layer}" for block in ("one", "two") for layer in ("up", "down")]
        keys = [f"{name}.weight K[0] {n}" for name in ("first", "last", *names) for n in (1, 2)]
        return dict.fromkeys(keys, torch.zeros(()))
    return run(Setting(None, 1 if KINDS[name][0] == "1 by 4" else 2), option)


def run(setting: Setting, option: str, **data: Any) -> Ends:
    options = RUNS[option]
    model = setting.shard(Net())
    optimizer = SINGD(model, **OPTIONS | {"loss_average": "batch"} | options | data)
    for step, (X, y) in enumerate(batches(STEPS, ROWS, POSITIONS, 4)):
        optimizer.zero_grad()
        if option == NOT_FINITE and step == 1 and setting.is_first:
            X[0] = float("nan")
        setting.backward(model, X, y)
        optimizer.step()
    if setting.layout is not None and options.get("places") == "shards":
        found = {row.parameter: row.place for row in optimizer.plan().rows}
        split = [n for n in found if n.endswith(("up.weight", "down.weight"))]
        assert {found[name] for name in split} == {"shards"}
        assert optimizer.plan().state_bytes == sum(nbytes(s) for s in optimizer.state.values())
    return snapshot(model, optimizer)


#: The mesh, whether positions are split too, and whether parameters are sharded over the data.
KINDS: dict[str, tuple[str, bool, bool]] = {
    "tensor parallelism over 4": ("1 by 4", False, False),
    "tensor parallelism over 2, data over 2": ("2 by 2", False, False),
    "tensor parallelism over 2, fully sharded over 2": ("2 by 2", False, True),
    "sequence parallelism over 4": ("1 by 4", True, False),
    "sequence parallelism over 2, fully sharded over 2": ("2 by 2", True, True),
}
SHARDS = {"*.up.*": ("dense", "block_diagonal(2)"), "*.down.*": ("block_diagonal(2)", "dense"),
          "*": ("dense", "dense")}  # fmt: skip
NOT_FINITE = "shards, a number that is not finite"
RUNS: dict[str, dict[str, Any]] = {
    "dense": {"structures": ("dense", "dense")},
    "structures": {"structures": ("block_diagonal(2)", "hierarchical(2, 1)")},
    "diagonal, all layers": {"structures": ("diagonal", "diagonal"), "layers": "all"},
    "every step": {"T": 1, "structures": ("lower_toeplitz", "dense")},
    "shards": {"structures": SHARDS, "places": "shards"},
    "shards, fused": {"structures": SHARDS, "places": "shards", "alpha1": 0.0, "T": 1},
    "shards of numbers": {
        "structures": {"*.up.*": ("dense", "diagonal"), "*": ("diagonal", "dense")},
        "places": "shards",
        "alpha1": 0.0,
    },
    "shards, grafted": {
        "structures": ("block_diagonal(2)", "block_diagonal(2)"),
        "places": "shards",
        "graft": "adamw",
        "kl_clip": None,
        "lr": 0.02,
    },
    "shards, a number that is not finite": {"structures": SHARDS, "places": "shards"},
    "grafted": {"graft": "adamw", "kl_clip": None, "lr": 0.02, "layers": "all"},
}


def places(context: Context, name: str, option: str) -> Ends:
    """The places of the numbers that this rank holds, of parameters that are their own places."""
    mesh, *how = KINDS[name]
    used = Parallel(context.meshes[mesh], *how)
    model: Any = Net()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.arange(p.numel()).view(p.shape))
    optimizer = SINGD(used.shard(model), data=used.data())
    parts = optimizer._parts
    found = {}
    for matrix in parts.parameters.matrices:
        for slot in parts.placement.holding([matrix]).slots[0]:
            held = slot.of(slot.parameter).flatten()
            error = slot.indices.of(torch.arange(held.numel())) - held
            found[f"{matrix.name} K[0] {slot.parameter.ndim}"] = error.norm()
    return found


def cases() -> dict[str, Any]:
    shards = [option for option in RUNS if option.startswith("shards")]
    chosen = [(name, option) for name in KINDS for option in RUNS if option not in shards][::2]
    names = list(KINDS)
    chosen += [(name, option) for name in names[:3] for option in shards[:3]]
    chosen += [(name, option) for name in names[3:] for option in shards[1:2]]
    chosen += [(names[0], shards[3]), (names[2], shards[3]), (names[1], NOT_FINITE)]
    found = {f"{name}, {option}": (parallel, name, option) for name, option in chosen}
    return found | {f"{name}, places": (places, name, "") for name in KINDS}
