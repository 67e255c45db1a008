"""The number of samples is the model's, whatever dimension a layer is called with first.

Where the loss is a mean over N samples, statistics are normalized as if N had been counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from singd import SINGD
from tests.singd.runs import distance, snapshot

N, P = 5, 7


@dataclass
class Batch:
    x: Tensor


class Net(nn.Module):
    """Layers of all kinds, used by ``run(self, *inputs)``."""

    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.run = run
        self.ids, self.places = nn.Embedding(9, 4), nn.Embedding(P, 4)
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.images, self.series = nn.Conv2d(2, 4, 3), nn.Conv1d(2, 4, 3)
        self.out = nn.Linear(4, 3)

    def forward(self, *inputs: Any) -> Tensor:
        return self.run(self, *inputs)


def sequences() -> Tensor:
    return torch.randn(N, P, 4)


def windows(m: Any, x: Tensor) -> Tensor:
    """Swin: windows of three positions are samples of their own, until they are put together."""
    y = m.a(x.unflatten(1, (3, 3)).flatten(0, 1)).tanh()
    return m.out(y.unflatten(0, (len(x), 3)).mean((1, 2)))


def by_hand(m: Any, x: Tensor) -> Tensor:
    z = torch.zeros(len(x), 4)
    for t in range(x.shape[1]):
        z = torch.tanh(m.a(x[:, t]) + m.b(z))
    return m.out(z)


def transposed(m: Any, x: Tensor) -> Tensor:
    return m.out(m.a(x.transpose(0, 1)).tanh()).mean(0)


def sequence_first_tokens(m: Any, ids: Tensor) -> Tensor:
    return m.out(m.a(m.ids(ids).transpose(0, 1)).tanh()).mean(0)


def queries(m: Any, x: Tensor) -> Tensor:
    """Perceiver: what asks belongs to the model, and has no samples."""
    weights = torch.softmax(m.a(m.places(torch.arange(3))) @ m.b(x).mT, -1)
    return m.out(weights @ m.c(x)).mean(1)


def places(m: Any, ids: Tensor) -> Tensor:
    return m.out((m.ids(ids) + m.places(torch.arange(P))).tanh().mean(1))


def experts(m: Any, x: Tensor) -> Tensor:
    """Every token goes to one of three."""
    rows = x.flatten(0, 1)
    route = torch.arange(len(rows)) % 3
    out = torch.zeros_like(rows)
    for k, expert in enumerate((m.a, m.b, m.c)):
        out = out.index_add(0, (route == k).nonzero()[:, 0], expert(rows[route == k]))
    return m.out(out.view_as(x).tanh()).mean(1)


def frames(m: Any, x: Tensor) -> Tensor:
    """A video, frame by frame."""
    y = m.images(x.flatten(0, 1)).mean((2, 3))
    return m.out(m.a(y).tanh().unflatten(0, x.shape[:2]).mean(1))


def pixels(m: Any, x: Tensor) -> Tensor:
    """Every position of an image is a row of what follows."""
    rows = m.images(x).flatten(2).mT.flatten(0, 1)
    return m.out(m.a(rows).tanh()).unflatten(0, (len(x), -1)).mean(1)


def time_first(m: Any, t: Tensor, x: Tensor) -> Tensor:
    """One time for all samples."""
    return m.out(torch.tanh(m.series(x) + m.a(t)[..., None]).mean(2))


def mask_first(m: Any, mask: Tensor, x: Tensor) -> Tensor:
    return m.out((mask.float() @ m.a(x)).tanh()).mean(1)


def shared_context(m: Any, x: Tensor, context: Tensor) -> Tensor:
    return m.out(torch.softmax(m.a(x) @ m.b(context).mT, -1) @ context).mean(1)


def tokens() -> Tensor:
    return torch.randint(9, (N, P))


CASES: dict[str, tuple[Any, Callable[[], tuple[Any, ...]]]] = {
    "windows": (windows, lambda: (torch.randn(N, 9, 4),)),
    "cells by hand": (by_hand, lambda: (sequences(),)),
    "transposed": (transposed, lambda: (sequences(),)),
    "transposed tokens": (sequence_first_tokens, lambda: (tokens(),)),
    "a dictionary": (lambda m, d: transposed(m, d["x"]), lambda: ({"x": sequences()},)),
    "a dataclass": (lambda m, b: transposed(m, b.x), lambda: (Batch(sequences()),)),
    "queries of its own": (queries, lambda: (sequences(),)),
    "places looked up once": (places, lambda: (tokens(),)),
    "experts": (experts, lambda: (sequences(),)),
    "frames": (frames, lambda: (torch.randn(N, 3, 2, 4, 4),)),
    "pixels": (pixels, lambda: (torch.randn(N, 2, 4, 4),)),
    "a time first": (time_first, lambda: (torch.randn(1, 4), torch.randn(N, 2, 6))),
    "a mask first": (mask_first, lambda: (torch.ones(P, P).tril().bool(), sequences())),
    "a context of all": (shared_context, lambda: (sequences(), torch.randn(6, 4))),
    "a list of images": (
        lambda m, xs: m.out(m.images(torch.stack(xs)).mean((2, 3))),
        lambda: ([torch.randn(2, 4, 4) for _ in range(N)],),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_factors_are_those_of_the_number_of_samples(name: str) -> None:
    run, draw = CASES[name]
    data = [draw() for _ in range(2)]
    ends = []
    for counts in (False, True):
        torch.manual_seed(0)
        model = Net(run)
        options: dict[str, Any] = {"kl_clip": 1e-3, "graft": None, "layers": "all"}
        optimizer = SINGD(model, T=1, lr=0.01, loss_average="batch", **options)
        for inputs in data:
            optimizer.zero_grad()
            if counts:
                optimizer.count_terms(N)
            (model(*inputs).square().sum() / N).backward()
            optimizer.step()
        ends.append(snapshot(model, optimizer))
    assert distance(*ends) < 1e-6
