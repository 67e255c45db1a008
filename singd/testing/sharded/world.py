"""Processes that run the same functions, many in one start."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

Ended = dict[str, Any]
"""What cases end with, by name; a text for an error."""


def _rank(
    rank: int, ranks: int, folder: str, begin: Callable[[Path], Any], cases: Mapping[str, Any]
) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    context, ended = begin(Path(folder)), {}
    for name, (function, *args) in cases.items():
        try:
            ended[name] = function(context, *args)
        except BaseException:  # of torch.distributed.checkpoint are some
            ended[name] = traceback.format_exc()
            traceback.print_exc()  # others may never end
    torch.save(ended, Path(folder, f"{rank}.part"))
    os.replace(Path(folder, f"{rank}.part"), Path(folder, str(rank)))
    with contextlib.suppress(RuntimeError):  # ranks that disagree have said so
        dist.barrier()
    os._exit(0)  # FSDP2 on gloo does not always end by itself


def spawn_within(
    limit: float, function: Callable[..., None], args: tuple[Any, ...], n: int
) -> None:
    """``function(rank, *args)`` in ``n`` processes, which are ended after ``limit`` seconds.

    Raises:
        TimeoutError: If they were not done by then.
    """
    spawned: Any = spawn(function, args, nprocs=n, join=False)
    deadline = time.monotonic() + limit
    while not spawned.join(timeout=1):  # raises what a rank raised
        if time.monotonic() > deadline:
            for process in spawned.processes:
                process.kill()
            raise TimeoutError(f"{n} ranks were not done in {limit} s")


def run(
    folder: Path,
    begin: Callable[[Path], Any],
    cases: Mapping[str, Any],
    ranks: int = 4,
    limit: int = 600,
) -> list[Ended]:
    """What all cases end with, on every rank.

    Args:
        folder: An empty folder.
        begin: Function of the folder that every rank calls first.
        cases: Functions and their further arguments, by name; the first is what ``begin`` returned.
        ranks: Number of processes.
        limit: Seconds until the processes are ended.

    Raises:
        TimeoutError: If they were not done in time.
    """
    spawn_within(limit, _rank, (ranks, str(folder), begin, cases), ranks)
    return load(folder, ranks)


def load(folder: Path, ranks: int = 4) -> list[Ended]:
    """What :func:`run` gave, from its folder."""
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(ranks)]
