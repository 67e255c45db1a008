"""What is frozen of every configuration, and the file of it.

``python -m tests.frozen.record --write [-k PATTERN]`` rewrites entries and prints those that
changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from singd.testing.sharded.world import spawn_within
from tests.frozen.cases import BF16, CASES, F16, F32, F64
from tests.frozen.train import WAYS, Run

FILE = Path(__file__).with_name("frozen.json")
PROJECTIONS = 8

#: By how much sketches differ between processors, relative to the norm of the movement.
TOLERANCES = {F64: 1e-11, F32: 1e-4, F16: 0.05, BF16: 0.2}

Record = dict[str, Any]


def processor() -> dict[str, Any]:
    """What the last bits depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return {
        "machine": platform.machine(),
        "vendor": next((x.split(": ")[1] for x in lines if x.startswith("vendor_id")), "unknown"),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        "float16": torch.ops.mkldnn._is_mkldnn_fp16_supported(),
        "torch": torch.__version__,
    }


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of types, shapes and bytes, whatever the order of the tensors."""
    each = []
    for t in tensors:
        raw = t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        each.append(hashlib.sha256(f"{t.dtype} {list(t.shape)}".encode() + raw).hexdigest())
    return hashlib.sha256(" ".join(sorted(each)).encode()).hexdigest()


def leaves(value: Any) -> Iterable[Tensor]:
    """The tensors in nested dictionaries and sequences."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from leaves(each)


def joined(digests: Mapping[str, str]) -> str:
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()[:16]


def state_digest(model: nn.Module, optimizer: Any) -> str:
    """Of the tensors stored for every parameter, by its name: no key of the state counts."""
    names = {p: name for name, p in model.named_parameters()}
    saved, digests = optimizer.state_dict(), {}
    for ours, theirs in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for p, number in zip(ours["params"], theirs["params"], strict=True):
            digests[names[p]] = digest(leaves(saved["state"].get(number, {})))
    return joined(digests)


def sketch(start: nn.Module, end: nn.Module) -> list[float]:
    """Projections of the movement of all weights onto seeded signs, and its norm."""
    moves = [
        (q.detach().double() - p.detach().double()).flatten()
        for (_, p), (_, q) in zip(
            sorted(start.named_parameters()), sorted(end.named_parameters()), strict=True
        )
    ]
    move = torch.cat(moves)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (PROJECTIONS, len(move)), generator=generator).double() * 2 - 1
    return [float(f"{x:.12g}") for x in (*(signs @ move).tolist(), move.norm().item())]


def record(name: str, rank: int = 0) -> Record:
    """Train one configuration, and take down where it ends."""
    case = CASES[name]
    with warnings.catch_warnings(action="ignore"):
        run = Run(case, rank)
        WAYS[case.way](run)
    weights = joined({k: digest([v]) for k, v in run.model.state_dict().items()})
    state = state_digest(run.model, run.optimizer)
    run.optimizer.close()
    return {"weights": weights, "state": state, "sketch": sketch(run.start, run.model)}


def worker(rank: int, ranks: int, folder: str, names: list[str]) -> None:
    """One rank of the configurations that have several."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    Path(folder, str(rank)).write_text(json.dumps({name: record(name, rank) for name in names}))
    dist.destroy_process_group()


@cache
def of_ranks() -> dict[str, Record]:
    """All configurations of two ranks; hashes of both."""
    names = [name for name, case in CASES.items() if case.ranks == 2]
    with tempfile.TemporaryDirectory() as folder:
        spawn_within(240, worker, (2, folder, names), 2)
        one, two = (json.loads(Path(folder, str(rank)).read_text()) for rank in range(2))
    for name, each in one.items():
        assert each["weights"] == two[name]["weights"], f"{name}: weights of the ranks differ"
        each["state"] += two[name]["state"]
    return dict(one)


def measured(name: str) -> Record:
    """The record of one configuration."""
    return of_ranks()[name] if CASES[name].ranks > 1 else record(name)


def write(pattern: str) -> None:
    """Rewrite the entries whose name contains ``pattern``, and print those that changed."""
    old = json.loads(FILE.read_text()) if FILE.exists() else {"processor": None, "cases": {}}
    if pattern and old["processor"] != processor():
        raise SystemExit(f"{FILE} is of another processor: write all entries at once")
    new = {}
    for name in CASES:
        before = old["cases"].get(name)
        if pattern in name:
            new[name] = measured(name)
            keys = [key for key in new[name] if before is None or before[key] != new[name][key]]
            if keys:
                print(f"{name}: {'new' if before is None else ', '.join(keys)}")
        elif before is not None:
            new[name] = before
    for name in old["cases"].keys() - CASES.keys():
        print(f"{name}: removed")
    entries = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in new.items())
    head = json.dumps(processor())
    FILE.write_text(f'{{"processor": {head},\n "cases": {{\n{entries}\n}}}}\n')


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", required=True)
    parser.add_argument("-k", metavar="PATTERN", default="", help="part of the names to rewrite")
    torch.set_num_threads(1)
    write(parser.parse_args().k)
