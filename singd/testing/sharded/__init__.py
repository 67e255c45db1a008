"""What optimizers of sharded models must do, row by row: :func:`check_sharded`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from singd.testing.conformance.training import Make
from singd.testing.sharded import rows as _rows
from singd.testing.sharded.setting import Ends, Layout, Setting
from singd.testing.sharded.world import run

__all__ = ["SHARDED_ROWS", "check_sharded"]

SHARDED_ROWS = MappingProxyType({row.__name__: row for row in _rows.ROWS})
"""The rows by name."""


def check_sharded(
    optimizer: Make,
    *,
    ranks: int = 2,
    rows: Iterable[str] = SHARDED_ROWS,
    tolerance: float = 1e-9,
    limit: int = 600,
) -> None:
    """Raise unless an optimizer ends on sharded parameters where it ends in one process.

    A small net under :func:`torch.distributed.fsdp.fully_shard` is trained in float64 by a few
    processes, which share every batch, on a CPU. Processes are spawned: call it in a test, or below
    ``if __name__ == "__main__"``.

    Args:
        optimizer: Class, or function, called as ``optimizer(model)``; another process must be able
            to import it. :func:`functools.partial` sets options.
        ranks: Number of processes.
        rows: Names from :data:`SHARDED_ROWS`; all of them by default.
        tolerance: Relative difference that is allowed, tensor by tensor, but in the row ``noise``.
        limit: Seconds until the processes are ended.

    Raises:
        AssertionError: Names the rows that fail, and how.
        ValueError: If a row is unknown.
        TimeoutError: If the processes were not done in time.
    """
    chosen = list(rows)
    for name in chosen:
        if name not in SHARDED_ROWS:
            raise ValueError(f"expected rows among {', '.join(SHARDED_ROWS)}, got {name!r}")
    with tempfile.TemporaryDirectory() as folder:
        cases = {name: (on_rank, optimizer, name) for name in chosen}
        ended = run(Path(folder), _begin, cases, ranks, limit)
    faults = {}
    for name in chosen:
        bound = _rows.TOLERANCES.get(SHARDED_ROWS[name], tolerance)
        fault = compare([each[name] for each in ended], alone(optimizer, name, ranks), bound)
        if fault:
            says = (SHARDED_ROWS[name].__doc__ or "").splitlines()[0]
            faults[name] = f"row {name!r} fails: {fault}\n  the row: {says}"
    if faults:
        raise AssertionError("\n".join(faults.values()))


def _begin(folder: Path) -> Layout:
    from torch.distributed.device_mesh import init_device_mesh  # takes time to import

    return Layout(init_device_mesh("cpu", (torch.distributed.get_world_size(),)))


def on_rank(layout: Any, optimizer: Make, name: str) -> Ends:
    """What a row ends with on the rank that has this layout."""
    return SHARDED_ROWS[name](optimizer, Setting(layout, layout.ranks))


def alone(optimizer: Make, name: str, ranks: int) -> Ends:
    """What a row ends with in one process that takes the place of some ranks."""
    return SHARDED_ROWS[name](optimizer, Setting(None, ranks))


def compare(ended: list[Any], expected: Mapping[str, Tensor], tolerance: float) -> str:
    """What is wrong with that on which all ranks ended; nothing if all is as expected."""
    for rank, each in enumerate(ended):
        if isinstance(each, str):
            return f"rank {rank}: {each}"
        others = sorted(each.keys() ^ expected.keys())
        if others:
            return f"rank {rank} has {len(others)} other tensors, {', '.join(others[:4])}"
        for name, t in each.items():
            if not torch.equal(t.nan_to_num(0.5), ended[0][name].nan_to_num(0.5)):
                return f"{name} differs between ranks 0 and {rank}"
    for name, t in expected.items():
        got, wanted = ended[0][name].double().nan_to_num(0.5), t.double().nan_to_num(0.5)
        error = float((got - wanted).norm() / (wanted.norm() or 1))
        if got.shape != wanted.shape or not error <= tolerance:
            return f"{name} differs by {error:.1e} from one process"
    return ""
