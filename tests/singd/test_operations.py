"""How many operations a step takes: what a GPU waits for where layers are small."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.singd.paper import SINGD
from tests.singd.runs import mean_loss

FREE = ("empty", "profiler", "promote_types", "_record_function")


class Counted(TorchDispatchMode):
    """Counts operations that compute or copy something."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        view = isinstance(func, torch._ops.OpOverload) and func.is_view
        self.count += not view and not any(word in str(func) for word in FREE)
        return func(*args, **(kwargs or {}))


def operations(layers: int, structure: str, **options: Any) -> tuple[int, int]:
    """Of a step that updates the factors, and of one that does not; all layers differ."""
    sizes = [8 + i for i in range(layers + 1)]
    model = nn.Sequential(*[nn.Linear(m, n) for m, n in itertools.pairwise(sizes)])
    optimizer = SINGD(model, T=2, structures=(structure, structure), **options)
    X, y = torch.randn(32, sizes[0]), torch.randn(32, sizes[-1])
    counts = []
    for _ in range(6):
        optimizer.zero_grad()
        mean_loss(model(X), y).backward()
        with Counted() as counted:
            optimizer.step()
        counts.append(counted.count)
    return counts[-2], counts[-1]


@pytest.mark.parametrize(
    ("structure", "update", "plain"), [("diagonal", 30, 6), ("dense", 56, 12)], ids=str
)
def test_operations_of_one_more_layer(structure: str, update: int, plain: int) -> None:
    """Counts, not limits that somebody chose: fewer are better, more need a reason."""
    few, many = operations(4, structure), operations(8, structure)
    each = [(b - a) / 4 for a, b in zip(few, many, strict=True)]
    assert each[0] <= update
    assert each[1] <= plain


def test_lengths_of_all_directions_are_found_together() -> None:
    """Of one more layer there are its norms, the wanted one, and the products with both parts."""
    each = []
    for graft in (None, "running"):
        few, many = (operations(n, "diagonal", graft=graft, kl_clip=None)[1] for n in (4, 8))
        each.append((many - few) / 4)
    assert each[1] - each[0] <= 6


def test_profilers_show_the_parts_of_a_step() -> None:
    model = nn.Linear(3, 2)
    optimizer = SINGD(model, T=1)
    with torch.profiler.profile() as profiler:
        mean_loss(model(torch.randn(4, 3)), torch.randn(4, 2)).backward()
        optimizer.step()
    names = {event.name for event in profiler.events()}
    parts = ("capture", "factors", "directions", "parameters")
    assert {f"singd::{part}" for part in parts} <= names
