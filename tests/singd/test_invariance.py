"""However a batch is split into micro-batches, the step is the same to float64 rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.singd.dense import relative
from tests.singd.paper import KFAC, SINGD
from tests.singd.runs import F64, Snapshot, distance, snapshot

AVERAGES = (None, "batch", "batch+sequence")
RULES: dict[str, Any] = {
    "IKFAC": lambda model, **kw: SINGD(model, kfac_like=True, **kw),
    "INGD": SINGD,
    "SINGD": lambda model, **kw: SINGD(model, structures=("hierarchical(1, 2)", "diagonal"), **kw),
    "KFAC": KFAC,
}


class Net(nn.Module):
    """A convolution, a layer used twice in every pass, and a head; output ``[N, P, 2]``."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.convolution = nn.Conv1d(3, 4, 2, dtype=F64)
            self.twice = nn.Linear(4, 4, dtype=F64)
            self.head = nn.Linear(4, 2, bias=False, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.convolution(x).mT
        for _ in range(2):
            h = self.twice(h).tanh()
        return self.head(h)


def loss_terms(x: Tensor, average: str | None) -> int:
    return {None: 1, "batch": len(x), "batch+sequence": len(x) * (x.shape[-1] - 1)}[average]


def run(rule: str, splits: list[list[int]], average: str | None, approximation: str) -> Snapshot:
    """Three steps on the same batches of nine, each split as given."""
    model, generator = Net(), torch.Generator().manual_seed(2)
    optimizer = RULES[rule](
        model, T=1, lr=0.05, damping=0.1, loss_average=average, kfac_approx=approximation
    )
    for sizes in splits:
        X = torch.randn(9, 3, 6, generator=generator, dtype=F64)
        optimizer.zero_grad()
        for x in X.split(sizes):
            (model(x).square().sum() / loss_terms(X, average)).backward()
        optimizer.step()
    return snapshot(model, optimizer)


@st.composite
def split(draw: Any, total: int = 9) -> list[int]:
    """Any way to write ``total`` as a sum."""
    sizes: list[int] = []
    while (rest := total - sum(sizes)) > 0:
        sizes.append(draw(st.integers(1, rest)))
    return sizes


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=8, deadline=None)
@given(
    splits=st.lists(split(), min_size=3, max_size=3),
    approximation=st.sampled_from(["expand", "reduce"]),
)
def test_micro_batches(
    rule: str, average: str | None, splits: list[list[int]], approximation: str
) -> None:
    whole = run(rule, [[9]] * 3, average, approximation)
    assert distance(run(rule, splits, average, approximation), whole) < 1e-12


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_samples_does_not_matter(rule: str) -> None:
    snapshots = []
    for order in (torch.arange(9), torch.randperm(9)):
        model = Net()
        optimizer = RULES[rule](model, T=1, lr=0.05)
        X = torch.randn(9, 3, 6, generator=torch.Generator().manual_seed(2), dtype=F64)
        (model(X[order]).square().sum() / 9).backward()
        optimizer.step()
        snapshots.append(snapshot(model, optimizer))
    assert distance(*snapshots) < 1e-12


@pytest.mark.parametrize("average", AVERAGES)
def test_sequences_of_different_lengths(average: str | None) -> None:
    """Micro-batches may differ in length: terms add up, whatever their shape."""
    layer = nn.Linear(3, 2, bias=False, dtype=F64)
    optimizer = KFAC(layer, T=1, lr_cov=1.0, damping=1.0, loss_average=average)
    parts = [torch.randn(n, length, 3, dtype=F64) for n, length in ((2, 5), (4, 3), (1, 7))]
    terms = {None: 1, "batch": 2 + 4 + 1, "batch+sequence": 2 * 5 + 4 * 3 + 1 * 7}[average]
    for x in parts:
        (0.5 * layer(x).square().sum() / terms).backward()
    rows = torch.cat([x.flatten(0, 1) for x in parts])
    g = (rows @ layer.weight.T / terms).detach()
    optimizer.step()
    state = optimizer.state[layer.weight]
    assert relative(state["S_K"][0], rows.T @ rows / len(rows)) < 1e-12
    assert relative(state["S_C"][0], terms * g.T @ g) < 1e-12


def test_counted_terms_replace_those_of_the_loss_average() -> None:
    """A mean over the tokens that are not padding, known only to the loss."""
    layer = nn.Linear(3, 2, bias=False, dtype=F64)
    optimizer = KFAC(layer, T=1, lr_cov=1.0, damping=1.0, loss_average="batch+sequence")
    X = torch.randn(4, 5, 3, dtype=F64)
    mask = torch.rand(4, 5) < 0.5
    for x, m in zip(X.split([1, 3]), mask.split([1, 3]), strict=True):
        optimizer.count_terms(m.sum())
        (0.5 * (layer(x)[m]).square().sum() / mask.sum()).backward()
    g = (X[mask] @ layer.weight.T / mask.sum()).detach()
    optimizer.step()
    assert relative(optimizer.state[layer.weight]["S_C"][0], mask.sum() * g.T @ g) < 1e-12
