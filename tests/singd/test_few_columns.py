"""A sum of few columns that is held as these is that sum, however it is added up and scaled."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from singd.capture.statistics import Statistic, side_by_side
from structured import Dense
from tests.singd.paper import SINGD
from tests.singd.runs import distance, snapshot


def columns(n: int, rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, rows, dtype=torch.float64, generator=generator)


def held(X: Tensor) -> Statistic:
    return Statistic(X.clone())


def summed(X: Tensor) -> Statistic:
    return Statistic(Dense(X @ X.mT))


def both(one: Statistic, other: Statistic) -> Statistic:
    one.add_(other)
    return one


def close(one: Statistic, other: Statistic) -> None:
    torch.testing.assert_close(one.mean(), other.mean())  # before and after it is read
    torch.testing.assert_close(one.value.to_dense(), other.value.to_dense())
    torch.testing.assert_close(one.mean(), other.mean())
    assert one.columns is None
    assert one.kind == other.kind


SIZES = st.integers(1, 8), st.integers(0, 4), st.integers(0, 4), st.sampled_from([0.0, 0.3, 2.0])


@given(*SIZES)
def test_sums_and_multiples(n: int, first: int, second: int, weight: float) -> None:
    X, Y = columns(n, first, 0), columns(n, second, 1)
    expected = both(summed(X), summed(Y))
    for one, other in product((held, summed), repeat=2):
        close(both(one(X), other(Y)), expected)
        close(both(one(X), other(Y)).scaled(weight), expected.scaled(weight))
    factor = torch.tensor(weight, dtype=torch.float64)
    close(held(X).scaled(factor), summed(X).scaled(factor))
    close(held(X).with_tensors(held(X).tensors()), summed(X))


@given(*SIZES[:3])
def test_tensors_are_those_of_the_sum(n: int, first: int, second: int) -> None:
    """What ranks add in place is added."""
    X, Y = columns(n, first, 0), columns(n, second, 1)
    one = held(X)
    for t, u in zip(one.tensors(), summed(Y).tensors(), strict=True):
        t.add_(u)
    close(one, both(summed(X), summed(Y)))


@given(*SIZES[:3])
def test_side_by_side(n: int, first: int, second: int) -> None:
    X, Y = columns(n, first, 0), columns(n, second, 1)
    close(side_by_side([held(X), held(Y)]), side_by_side([summed(X), summed(Y)]))
    close(side_by_side([held(X)]), side_by_side([summed(X)]))


def test_many_columns_become_a_sum() -> None:
    X = columns(8, 4, 0)
    assert both(held(X), held(X[:, :0])).columns is not None
    assert both(held(X), held(X[:, :1])).columns is None


@pytest.mark.parametrize("options", [{}, {"kfac_like": True}, {"keep_products": False}])
@pytest.mark.parametrize("ends", ["at once", "in parts", "changed inputs"])
def test_training_on_few_rows(options: dict[str, bool], ends: str) -> None:
    """Statistics of two rows end where those end that are summed before anything is done."""
    runs = []
    for is_held in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 10, bias=False), nn.Tanh(), nn.Linear(10, 9)).double()
        optimizer = SINGD(model, T=1, lr=0.05, structures=("dense", "dense"), **options)
        for step in range(6):
            X = columns(2, 12, step)
            optimizer.zero_grad()
            for part in X.split(1 if ends == "in parts" else 2):
                (model(part).square().sum() / 2).backward()
            if not is_held:
                for accumulator in optimizer._parts.capture.accumulators.values():
                    one = accumulator.total
                    assert one is not None
                    assert one.input.columns is not None
                    one.input.tensors(), one.grad.tensors()  # reads them
            if ends == "changed inputs":  # a buffer that is used again
                X.zero_()
            optimizer.step()
        runs.append(snapshot(model, optimizer))
    assert distance(*runs) < 1e-12
