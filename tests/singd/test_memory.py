"""What a step and its capture allocate is what the structure promises."""

from __future__ import annotations

import gc
import random

import pytest
import torch
from torch import Tensor, nn

from benchmarks.peak import PeakBytes
from singd.placement import Holding, base
from singd.step import batch
from tests.singd.paper import SINGD

STRUCTURES = ("diagonal", "block_diagonal(8)", "hierarchical(4, 4)", "lower_toeplitz", "dense")
WIDE, NARROW, ROWS = 1024, 8, 4


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long)).backward()
    optimizer.step()


def factor_bytes(optimizer: SINGD) -> int:
    return sum(
        t.nbytes
        for matrix in optimizer._parts.parameters.matrices
        for m in optimizer._parts.store.factors(matrix).members().values()
        for t in m.tensors()
    )


@pytest.mark.parametrize("structure", STRUCTURES)
def test_no_operation_makes_more_than_the_structure_promises(structure: str) -> None:
    """A few gradients, or columns, of the layer, or its factor: n^2 only where it is dense.

    FFTs of Toeplitz factors have four times as many numbers: twice the length, and complex.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDE, NARROW), nn.Linear(NARROW, 3))
    optimizer = SINGD(model, structures=(structure, structure), T=1)
    x = torch.randn(ROWS, WIDE)
    train_step(model, optimizer, x)  # finds out whether the layers are explained
    with PeakBytes() as count:
        train_step(model, optimizer, x)
    gradient = 4 * (WIDE + 1) * NARROW
    largest = max(4 * gradient, *(t.nbytes for t in optimizer.state[model[0].weight]["K"]))
    assert count.largest <= 1.01 * largest
    square = 4 * (WIDE + 1) ** 2
    assert (count.largest >= square) == (structure == "dense")


@pytest.mark.parametrize("structure", STRUCTURES)
def test_extra_peak_of_convolutions(structure: str) -> None:
    """At most the largest input of a layer, the factors, their products and their statistics.

    The patches of one of these layers are nine times its input.
    """
    torch.manual_seed(0)
    x = torch.randn(64, 3, 32, 32)

    def model() -> nn.Module:
        first, second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        last = nn.Linear(16, 10)
        return nn.Sequential(
            first, nn.ReLU(), second, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), last
        )

    def peak(net: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        with PeakBytes() as count:
            count.add(net.parameters())
            for _ in range(2):  # the second with all state; both look whether layers are explained
                train_step(net, optimizer, x)
        return count.peak

    plain, hooked = model(), model()
    least = peak(plain, torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9))
    optimizer = SINGD(hooked, structures=(structure, structure), T=1)
    largest_input = 4 * 64 * 16 * 32 * 32
    assert peak(hooked, optimizer) - least <= largest_input + 3 * factor_bytes(optimizer)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return out


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(16, 32), (8, 5, 16)),
        (nn.Conv2d(16, 32, 3, padding=1), (8, 16, 6, 6)),
        (nn.ConvTranspose2d(16, 32, 3), (8, 16, 6, 6)),
        (Attention(), (8, 5, 16)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_the_capture_keeps_nothing_that_autograd_does_not(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    """Bytes that are alive between forward and backward pass, with hooks and without."""
    model, kept = nn.Sequential(nn.Tanh(), layer, nn.Tanh()), []
    x = torch.randn(shape)
    for hooked in (False, True):
        optimizer = SINGD(model, T=1)
        if hooked:
            model(x).sum().backward()
            optimizer.step()  # what is made once is made now
            optimizer.zero_grad()
        else:
            optimizer.close()
        with PeakBytes() as count:
            count.add([x, *model.parameters()])
            output = model(x)
            kept.append(count.now)
            optimizer._parts.capture.discard()
            del output
        optimizer.close()
    assert kept[0] == kept[1]


def test_what_is_remembered_of_sets_of_layers_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where layers are dropped at random, other ones have a gradient in every step."""
    monkeypatch.setattr(base, "_HOLDINGS", 5)
    monkeypatch.setattr(batch, "_SELECTIONS", 5)
    chosen, layers = random.Random(0), nn.ModuleList(nn.Linear(3, 3) for _ in range(12))
    optimizer = SINGD(layers, T=2)
    before = sum(type(x) is Holding for x in gc.get_objects())
    for _ in range(30):
        optimizer.zero_grad()
        h = torch.randn(4, 3)
        for layer in layers:
            h = h + layer(h) if chosen.random() < 0.7 else h
        h.square().mean().backward()
        optimizer.step()
    gc.collect()
    assert sum(type(x) is Holding for x in gc.get_objects()) - before <= 5
    batches = {id(b): b for b in gc.get_objects() if type(b) is batch.Batch}
    assert max(len(b._places) for b in batches.values()) <= 5
