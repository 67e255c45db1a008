"""Bytes and operations of small runs on four ranks, over those that are predicted."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.results import Row, keep
from benchmarks.scale.methods import Estimate, adamw, muon, singd, soap
from benchmarks.scale.models import Assumptions, Model
from benchmarks.scale.work import Counter, Work
from singd import SINGD
from singd.ops.dtensor import local
from singd.testing.sharded.counting import Counting
from singd.testing.sharded.world import run

RANKS, TOKENS, INTERVAL = 4, 96, 2
MODEL = Model(width=32, hidden=96, layers=2, keys=16, vocabulary=0, is_tied=True)
WARM = 6  # steps, after which no pass is verified until step 8
CASES: list[tuple[str, str, str]] = [
    *(("dense", "dense", place) for place in ("everywhere", "columns", "owned")),
    *(("hierarchical(4, 4)", "hierarchical(4, 4)", place) for place in ("everywhere", "owned")),
    *(("block_diagonal(4)", "block_diagonal(4)", place) for place in ("rows", "owned")),
    *(("diagonal", "diagonal", place) for place in ("rows", "columns")),
    ("dense", "block_diagonal(4)", "rows"),
]


class Block(nn.Module):
    """The weights of a block of a transformer, without what has no weights."""

    def __init__(self) -> None:
        super().__init__()
        for m in MODEL.matrices():
            setattr(self, m.name, nn.Linear(m.columns, m.rows, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.silu(self.gate(x)) * self.up(x)
        return x + self.o(self.q(x).tanh()) + self.down(h) + (self.k(x) * self.v(x)).repeat(1, 2)


def sharded() -> nn.Module:
    from torch.distributed.fsdp import fully_shard  # takes time to import

    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(MODEL.layers)))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model: nn.Module, optimizer: Any) -> None:
    """Forward and backward pass."""
    optimizer.zero_grad()
    model(torch.randn(TOKENS, MODEL.width)).square().mean().backward()


def passes(model: nn.Module, optimizer: Any) -> Work:
    """Those of forward and backward pass, with what the optimizer does meanwhile."""
    with Counter() as counter:
        train(model, optimizer)
    return counter.work


def measured(_: Any, K: str, C: str, place: str) -> list[float]:
    """Bytes of state, of statistics, and sent; multiply-adds of a step; on this rank."""
    model = sharded()
    structures = (K, C)
    optimizer = SINGD(model, T=INTERVAL, burn_in=0, structures=structures, places=place)
    for _step in range(WARM):
        train(model, optimizer)
        optimizer.step()
    products, sent, buffers = 0.0, 0.0, 0.0
    for _step in range(INTERVAL):
        with Counting() as early:
            products += passes(model, optimizer).products
        sent += early.bytes
        seen = [o for o in optimizer._parts.capture.collect().values() if not o.is_elsewhere]
        held = sum(t.nbytes for one in seen for s in (one.input, one.grad) for t in s.tensors())
        buffers = max(buffers, float(held))
        with Counting() as bytes_, Counter() as counter:
            optimizer.step()
        products, sent = products + counter.work.products, sent + bytes_.bytes
    with optimizer.paused():
        own = passes(model, optimizer).products
    cached = [
        t
        for b in optimizer._parts.store.batches
        for p in (b.products or {}).values()
        for t in p.tensors()
    ]
    return [
        state_bytes(optimizer) + sum(t.nbytes for t in cached),
        buffers,
        sent / INTERVAL,
        products / INTERVAL - own,
    ]


def state_bytes(optimizer: Any) -> int:
    """What a rank holds."""
    values = [v for entry in optimizer.state.values() for v in entry.values()]
    tensors = [t for v in values for t in (v if isinstance(v, list) else [v])]
    return sum(local(t).nbytes for t in tensors if isinstance(t, Tensor) and t.ndim)


def of_adamw(_: Any) -> list[float]:
    """The same of AdamW, which sends nothing."""
    model = sharded()
    optimizer = torch.optim.AdamW(model.parameters())
    passes(model, optimizer)
    optimizer.step()
    return [float(state_bytes(optimizer)), 0.0, 0.0, 0.0]


def of_others(_: Any, name: str) -> list[float]:
    """The same of methods that are not sharded here, between new bases."""
    import pytorch_optimizer

    model = nn.Sequential(*(Block() for _ in range(MODEL.layers)))
    optimizer: Any = {
        "Muon": lambda: torch.optim.Muon(model.parameters()),
        "SOAP": lambda: pytorch_optimizer.SOAP(model.parameters(), precondition_frequency=100),
    }[name]()
    for _step in range(3):
        passes(model, optimizer)
        with Counter() as counter:
            optimizer.step()
    return [float(state_bytes(optimizer)), 0.0, 0.0, counter.work.products]


def predicted(K: str, C: str, place: str) -> Estimate:
    """By the cost model."""
    options = {"structures": (K, C)}
    given = Assumptions(interval=INTERVAL)
    return singd(MODEL.matrices(), RANKS, TOKENS, given, options, place)


def begin(_: Path) -> None:
    """Nothing is shared by cases."""


def check(out: Path | None = None) -> list[Row]:
    """Measured over predicted: state and operations of the rank with most, mean bytes sent."""
    cases: dict[str, Any] = {" ".join(case): (measured, *case) for case in CASES}
    cases |= {"AdamW": (of_adamw,), "Muon": (of_others, "Muon"), "SOAP": (of_others, "SOAP")}
    with tempfile.TemporaryDirectory() as folder:
        ended = run(Path(folder), begin, cases, RANKS)
    numbers = sum(m.count * m.numbers for m in MODEL.matrices())
    alone = Assumptions(interval=10**12)
    others = {
        ("AdamW",): adamw(numbers, RANKS),
        ("Muon",): muon(MODEL.matrices(), 1, TOKENS, alone),
        ("SOAP",): soap(MODEL.matrices(), 1, TOKENS, alone),
    }
    rows: list[Row] = []
    for case in [*others, *CASES]:
        ranks = [each[" ".join(case)] for each in ended]
        for each in ranks:
            if isinstance(each, str):
                raise RuntimeError(each)
        state, buffers, sent, products = (list(column) for column in zip(*ranks, strict=True))
        wanted = others[case] if case in others else predicted(*case)
        found: dict[str, tuple[float, float]] = {
            "state": (max(state), wanted.state),
            "buffers": (max(buffers), wanted.buffers),
            "sent": (sum(sent) / RANKS, wanted.sent),
            "products": (max(products), wanted.work.products),
        }
        names = dict(zip(("K", "C", "place"), (*case, "", ""), strict=False))
        row = names | {f"{k}, measured": f"{a:.6g}" for k, (a, _) in found.items()}
        row |= {
            f"{k}, over predicted": f"{a / b:.3f}" if b else "1" if not a else "inf"
            for k, (a, b) in found.items()
        }
        rows.append(row)
    if out is not None:
        keep(out / "scale_check.csv", rows, ("K", "C", "place"))
    return rows
