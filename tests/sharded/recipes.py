"""What ranks do that run the script of the documentation, or save until they are killed."""

from __future__ import annotations

import os
import signal
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh

from docs import snippets
from singd import SINGD
from singd.testing.sharded.rows import snapshot
from singd.testing.sharded.setting import Ends, Layout, Setting, batches, net

PAGE = Path(__file__).parents[2] / "docs" / "singd" / "sharded.md"
STEPS, SAVER = 8, 1  # the rank that does not lead


def script(rank: int, ranks: int, folder: str) -> None:
    """The whole page, as ``torchrun`` starts it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.chdir(folder)
    found = snippets.run(PAGE)
    names = ("fsdp", "hsdp", "places", "two_dimensional", "done", "again")
    torch.save({name: found[name] for name in (*names, "first")}, f"{rank}.part")
    os.rename(f"{rank}.part", f"{rank}")
    dist.barrier()
    os._exit(0)


def _kill(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_at_the_name(source: Any, target: Any, rename: Any = os.rename) -> None:
    if Path(target).name.isdecimal():
        _kill()
    rename(source, target)


#: The rank that is killed, and at which moment of the save.
KILLS: dict[str, tuple[int, Any, str, Any]] = {
    "before its file is written": (SAVER, FileSystemWriter, "write_data", _kill),
    "while others write": (0, FileSystemWriter, "write_data", _kill),
    "before it is known what was written": (0, FileSystemWriter, "finish", _kill),
    "before the checkpoint has its name": (0, os, "rename", _kill_at_the_name),
}


def train(rank: int, ranks: int, folder: str, meeting: str, kill: str) -> None:
    """All steps from the last checkpoint on; one rank is killed in the second save, if any."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    page = snippets.run(PAGE, "def save(")
    page["dist"] = dist
    setting = Setting(Layout(init_device_mesh("cpu", (ranks,))), ranks)
    model = setting.shard(net())
    optimizer = SINGD(model, T=2, burn_in=0, places="owned")
    first = page["load"](folder, model, optimizer)
    for step, (X, y) in enumerate(batches(STEPS)[first:], first):
        optimizer.zero_grad()
        setting.backward(model, X, y)
        optimizer.step()
        if kill and rank == KILLS[kill][0] and step == first + 1:
            mock.patch.object(*KILLS[kill][1:]).start()
        page["save"](folder, step + 1, model, optimizer)
    ended: Ends = snapshot(model, optimizer)
    if rank == 0:
        torch.save(ended, Path(folder, "ended"))
    dist.barrier()
    os._exit(0)
