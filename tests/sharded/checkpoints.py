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

SAVED = 3  # steps before the checkpoint
BATCHES = batches(6)
ALONE = "one process"
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Trainer:
    """A model in training.

    Args:
        layout: Layout of this rank; ``None`` for one process.
        group: Process group of one process, where there are several.
    """

    def __init__(self, layout: Layout | None, group: Any = None) -> None:
        self.setting = Setting(layout, 4 if layout is None else layout.ranks)
        self.model = self.setting.shard(net())
        options = OPTIONS | {"graft": "adamw", "kl_clip": None, "lr": 0.02}
        self.optimizer = SINGD(self.model, process_group=group, **options)

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


def make(context: Context, layout: str) -> Trainer:
    if layout == ALONE:
        return Trainer(None, context.single.get_group())
    return Trainer(context.layouts[layout])


def save(context: Context, layout: str) -> Ends:
    """Ranks save in two forms, and go on."""
    run = make(context, layout)
    run.train(slice(SAVED))
    run.save(context.folder / "sharded")
    both = get_state_dict(run.model, run.optimizer, options=WHOLE)
    if dist.get_rank() == 0:
        torch.save(both, context.folder / "whole.pt")
    dist.barrier()
    return run.train(slice(SAVED, None))


def resume(context: Context, layout: str) -> Ends:
    """Other ranks load what was saved."""
    run = make(context, layout)
    if layout == ALONE:
        run.load(context.folder / "sharded", no_dist=True)
    else:
        mesh = context.layouts[layout].mesh
        run.load(
            context.folder / "sharded", process_group=mesh.get_group() if mesh.ndim == 1 else None
        )
    return run.train(slice(SAVED, None))


def resume_whole(context: Context, layout: str) -> Ends:
    """Whole tensors are loaded, which only the first rank has where there are several."""
    run = make(context, layout)
    saved: Any = {}, {}
    if layout == ALONE or dist.get_rank() == 0:
        saved = torch.load(context.folder / "whole.pt", weights_only=False)
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


def alone(layout: str) -> Ends:
    """One process that is never interrupted."""
    return Trainer(None).train(slice(None))


def cases() -> dict[str, Any]:
    """Those that save come first."""
    return {
        "checkpoint saved: 4 ranks": (save, NAMES[0]),
        **{f"checkpoint of 4 ranks: {to}": (resume, to) for to in (*NAMES, ALONE)},
        **{f"whole checkpoint: {to}": (resume_whole, to) for to in (*NAMES[:2], NAMES[3], ALONE)},
        "checkpoint of one process: 4 ranks": (resume_from_one, NAMES[0]),
        "checkpoint of one process: 2 by 2 ranks": (resume_from_one, NAMES[3]),
    }
