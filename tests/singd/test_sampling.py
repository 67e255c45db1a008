"""Statistics of some rows in place of all: unbiased, with all counts, at any distance."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from singd import KFAC, SINGD
from singd.capture.statistics import Columns
from singd.placement import DataParallel
from singd.step import observer
from tests.frozen import nets
from tests.singd.runs import F64, batches, mlp, train

Found = dict[str, tuple[list[Tensor], tuple[int, int, int]]]


def statistics(
    net: str, samples: int, every: int = 1, phase: float | None = None, **options: Any
) -> Found:
    """Sums and counts of one pass, by name."""
    model = nets.make(net, F64)
    optimizer = SINGD(model, layers="all", sample=every, **options)
    X = nets.batch(net, 0, F64)[0][:samples]
    drawn = observer.sampling
    if phase is not None:
        drawn = lambda *_: (every, phase)  # noqa: E731
    with mock.patch.object(observer, "sampling", drawn):
        model(X).square().sum().backward()
    return {
        matrix.key: (
            [*one.input.tensors(), *one.grad.tensors()],
            (one.rows, one.samples, one.loss_terms),
        )
        for matrix, one in optimizer._parts.capture.collect().items()
    }


NETS = ("mlp", "sequence", "conv2d", "grouped", "transposed2d", "attention", "tied", "heads",
        "norms", "image norms")  # fmt: skip


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("net", NETS)
@settings(max_examples=4, deadline=None)
@given(every=st.integers(2, 4), samples=st.integers(1, 12), structure=st.sampled_from(
    ["dense", "diagonal", "block_diagonal(2)", "lower_triangular"]))  # fmt: skip
def test_the_mean_over_all_beginnings_is_the_sum_over_all_rows(
    net: str, approximation: str, every: int, samples: int, structure: str
) -> None:
    options = {"structures": (structure, "dense"), "kfac_approx": approximation}
    whole = statistics(net, samples, **options)
    phases = math.lcm(*range(1, every + 1))
    total: dict[str, list[Tensor]] = {}
    for i in range(phases):
        found = statistics(net, samples, every, (i + 0.5) / phases, **options)
        assert found.keys() == whole.keys()
        for name, (tensors, counts) in found.items():
            assert counts == whole[name][1]
            before = total.get(name, [torch.zeros_like(t) for t in tensors])
            total[name] = [a + t / phases for a, t in zip(before, tensors, strict=True)]
    for name, tensors in total.items():
        torch.testing.assert_close(tensors, whole[name][0], rtol=1e-12, atol=1e-12)


def test_fewer_rows_are_read() -> None:
    """Or there would be nothing to gain."""
    seen = []
    tensor = Columns.tensor

    def watched(self: Columns) -> Tensor:
        seen.append(tensor(self).shape[-1])
        return tensor(self)

    with mock.patch.object(Columns, "tensor", watched):
        statistics("sequence", 12, 4, structures=("dense", "dense"))
    assert set(seen) == {15}  # of 60


def test_rows_are_other_ones_at_every_step() -> None:
    model = mlp()
    optimizer = SINGD(model, T=1, sample=3)
    phases = []
    for batch in batches(40):
        phases.append(observer.sampling(optimizer.param_groups[0])[1])
        train(model, optimizer, [batch])
    assert len(set(phases)) == 40
    assert 0.35 < sum(phases) / 40 < 0.65


@pytest.mark.parametrize("method", [SINGD, KFAC])
def test_training_with_every_row_is_training(method: Any) -> None:
    """The distance that one row is from the next is no distance."""
    ended = []
    for options in ({}, {"sample": 1}):
        model = mlp()
        train(model, method(model, T=2, **options), batches(4))
        ended.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*ended, rtol=0, atol=0)


@pytest.mark.parametrize("net", NETS)
@settings(max_examples=3, deadline=None)
@given(sizes=st.lists(st.integers(1, 4), min_size=2, max_size=3), structure=st.sampled_from(
    ["dense", "diagonal", "hierarchical(1, 1)"]))  # fmt: skip
def test_the_mean_over_all_last_passes_is_the_sum_over_all_rows(
    net: str, sizes: list[int], structure: str
) -> None:
    """A row is in the last pass with the probability of the share of rows that the pass has."""
    X = nets.batch(net, 0, F64)[0][: sum(sizes)]
    parts = X.split(sizes)

    def of_passes(order: list[int], sample: Any) -> Found:
        model = nets.make(net, F64)
        optimizer = SINGD(model, layers="all", sample=sample, structures=(structure, "dense"))
        for i in order:
            model(parts[i]).square().sum().backward()
        return {
            matrix.key: (
                [*one.input.tensors(), *one.grad.tensors()],
                (one.rows, one.samples, one.loss_terms),
            )
            for matrix, one in optimizer._parts.capture.collect().items()
        }

    everything = list(range(len(sizes)))
    whole = of_passes(everything, 1)
    total: dict[str, list[Tensor]] = {}
    for last, size in enumerate(sizes):
        found = of_passes([*(i for i in everything if i != last), last], "last")
        assert found.keys() == whole.keys()
        for name, (tensors, counts) in found.items():
            assert counts == whole[name][1]
            before = total.get(name, [torch.zeros_like(t) for t in tensors])
            share = size / sum(sizes)
            total[name] = [a + share * t for a, t in zip(before, tensors, strict=True)]
    for name, tensors in total.items():
        torch.testing.assert_close(tensors, whole[name][0], rtol=1e-12, atol=1e-12)


def passes(model: Any, optimizer: SINGD, reduced: list[bool]) -> list[int]:
    """Numbers of products made in each of some passes, of which some reduce gradients."""
    made = []
    placement = type(optimizer._parts.placement)
    for is_reduced, (X, y) in zip(reduced, batches(len(reduced)), strict=True):
        with (
            mock.patch.object(placement, "is_reducing", return_value=is_reduced),
            mock.patch.object(Columns, "tensor", autospec=True, side_effect=Columns.tensor) as read,
        ):
            (model(X) - y).square().mean().backward()
        made.append(read.call_count)
    return made


def test_passes_that_are_not_reduced_are_counted_and_not_read() -> None:
    model = mlp()
    optimizer = SINGD(model, T=1, sample="last", structures=("dense", "dense"))
    assert passes(model, optimizer, [False, False, True]) == [0, 0, 4]
    found = optimizer._parts.capture.collect().values()
    whole = mlp()
    every = SINGD(whole, T=1, sample="last", structures=("dense", "dense"))
    passes(whole, every, [True, True, True])
    for one, other in zip(found, every._parts.capture.collect().values(), strict=True):
        assert (one.rows, one.samples, one.loss_terms) == (
            other.rows,
            other.samples,
            other.loss_terms,
        )
        torch.testing.assert_close(one.grad.tensors(), other.grad.tensors(), rtol=0, atol=0)
    optimizer.step()


def test_a_last_pass_that_is_missing_is_an_error() -> None:
    model = mlp()
    optimizer = SINGD(model, T=1, sample="last")
    passes(model, optimizer, [False, False])
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"0.weight: sample='last' reads .* got none"):
        optimizer.step()
    torch.testing.assert_close([p.detach() for p in model.parameters()], before, rtol=0, atol=0)
    optimizer.zero_grad()
    passes(model, optimizer, [True])
    optimizer.step()


def test_no_sync_says_that_a_pass_is_not_the_last() -> None:
    class Wrapper(nn.Module):
        require_backward_grad_sync = True

    wrapper = Wrapper()
    with mock.patch("torch.distributed.get_world_size", return_value=2):
        placement = DataParallel([None], False, wrapper)
    assert placement.is_reducing()
    wrapper.require_backward_grad_sync = False
    assert not placement.is_reducing()
    del wrapper
    assert placement.is_reducing()


def test_a_share_is_a_number_or_the_last_pass() -> None:
    with pytest.raises(ValueError, match="sample: expected an integer"):
        SINGD(mlp(), sample="first")


def test_one_sample_without_a_batch_is_read() -> None:
    model = nn.Linear(4, 3, dtype=F64)
    optimizer = SINGD(model, T=1, sample=2)
    model(torch.ones(4, dtype=F64)).sum().backward()
    optimizer.step()
    assert optimizer.plan().rows[0].rule == "SINGD"
