"""A process group of this process alone, for models that are sharded over a mesh of one."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist


@contextmanager
def one_rank(folder: Path) -> Iterator[None]:
    """The default group; its ranks would meet in an empty folder."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
    yield
    gc.collect()  # what waits for the group goes before it
    dist.destroy_process_group()
