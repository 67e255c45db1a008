"""Checkpoints of ``torch.distributed.checkpoint``, saved by some ranks and loaded by others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from singd import SINGD
from singd.testing.sharded.rows import snapshot
from singd.testing.sharded.setting import Ends, Layout, Setting, batches, net
from tests.sharded.layouts import NAMES, Context
from tests.sharded.scenarios import OPTIONS
from tests.sharded.traffic import ROWS

SAVED = 3  # steps before the checkpoint
BATCHES = batches(6)
ALONE = "one process"
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Trainer:
    """A model in training.

    Args:
        layout: Layout of this rank; ``None`` for one process.
        group: Process group of one process, where there are several.
        places: Where factors are worked on.
        is_rowed: Whether C has blocks, some of which end where the rows of ranks do.
    """

    def __init__(
        self,
        layout: Layout | None,
        group: Any = None,
        places: str = "everywhere",
        is_rowed: bool = False,
    ) -> None:
        self.setting = Setting(layout, 4 if layout is None else layout.ranks)
        self.model = self.setting.shard(net())
        options = OPTIONS | {"graft": "adamw", "kl_clip": None, "lr": 0.02}
        if is_rowed:
            options |= {"structures": ROWS, "alpha1": 0.0}
        self.optimizer = SINGD(self.model, process_group=group, places=places, **options)

    def train(self, part: slice) -> Ends:
        for X, y in BATCHES[part]:
            self.optimizer.zero_grad()
            self.setting.backward(self.model, X, y)
            self.optimizer.step()
        return snapshot(self.model, self.optimizer)

    def save(self, path: Path, **options: Any) -> None:
        weights, state = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=path, **options)

    def load(self, path: Path, **options: Any) -> None:
        """As the documentation of PyTorch shows it."""
        weights, state = get_state_dict(self.model, self.optimizer)
        saved = {"model": weights, "optimizer": state}
        dcp.load(saved, checkpoint_id=path, **options)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
        )


def make(
    context: Context, layout: str, places: str = "everywhere", saved: str = "everywhere"
) -> Trainer:
    is_rowed = "rows" in (places, saved)
    if layout == ALONE:
        return Trainer(None, context.single.get_group(), places, is_rowed)
    return Trainer(context.layouts[layout], None, places, is_rowed)


def save(context: Context, layout: str, places: str) -> Ends:
    """Ranks save in two forms, and go on."""
    run = make(context, layout, places)
    run.train(slice(SAVED))
    run.save(context.folder / places)
    both = get_state_dict(run.model, run.optimizer, options=WHOLE)
    if dist.get_rank() == 0:
        torch.save(both, context.folder / f"{places}.pt")
    dist.barrier()
    return run.train(slice(SAVED, None))


def resume(context: Context, layout: str, saved: str, places: str) -> Ends:
    """Other ranks load what was saved."""
    run = make(context, layout, places, saved)
    if layout == ALONE:
        run.load(context.folder / saved, no_dist=True)
    else:
        mesh = context.layouts[layout].mesh
        run.load(context.folder / saved, process_group=mesh.get_group() if mesh.ndim == 1 else None)
    return run.train(slice(SAVED, None))


def resume_whole(context: Context, layout: str, whole: str, places: str) -> Ends:
    """Whole tensors are loaded, which only the first rank has where there are several."""
    run = make(context, layout, places, whole)
    saved: Any = {}, {}
    if layout == ALONE or dist.get_rank() == 0:
        saved = torch.load(context.folder / f"{whole}.pt", weights_only=False)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=layout != ALONE)
    set_model_state_dict(run.model, saved[0], options=options)
    set_optimizer_state_dict(run.model, run.optimizer, saved[1], options=options)
    return run.train(slice(SAVED, None))


def resume_from_one(context: Context, layout: str) -> Ends:
    """One process saves, ranks load."""
    if dist.get_rank() == 0:
        one = make(context, ALONE)
        one.train(slice(SAVED))
        one.save(context.folder / "alone", no_dist=True)
    dist.barrier()
    run = make(context, layout)
    run.load(context.folder / "alone")
    return run.train(slice(SAVED, None))


def alone(*case: str) -> Ends:
    """One process that is never interrupted."""
    return Trainer(None, is_rowed="rows" in case).train(slice(None))


E, O, R = "everywhere", "owned", "rows"
_CASES: list[tuple[Any, ...]] = [  # those that save come first
    (save, NAMES[0], E),
    (save, NAMES[0], O),
    *((resume, to, E, E) for to in (NAMES[1], NAMES[2], NAMES[3], ALONE)),
    *((resume, to, O, O) for to in (NAMES[0], NAMES[2], NAMES[3], ALONE)),
    (resume, NAMES[1], O, E),
    (resume, NAMES[2], E, O),
    *((resume_whole, to, E, E) for to in (NAMES[0], NAMES[3], ALONE)),
    *((resume_whole, to, O, O) for to in (NAMES[0], ALONE)),
    (save, NAMES[0], R),
    *((resume, to, R, R) for to in (NAMES[1], NAMES[2], NAMES[3], ALONE)),
    (resume, NAMES[2], R, O),
    *((resume_whole, to, R, R) for to in (NAMES[0], ALONE)),
    (resume_from_one, NAMES[0]),
    (resume_from_one, NAMES[3]),
]


def cases() -> dict[str, Any]:
    return {f"{case[0].__name__}: {', '.join(case[1:])}": case for case in _CASES}
