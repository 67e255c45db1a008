"""Structures chosen from the curvature: least nats for the numbers, and nothing else is touched."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from singd import SINGD, choose_structures
from singd.capture.weight_matrix import WeightMatrix
from singd.methods.structure_choice import Option, StructureChoice, fewest_nats
from singd.placement import Demand
from singd.placement.replicated import OneProcess
from structured import divergence, inverse_root


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 12),
        nn.LayerNorm(12),
        nn.Linear(12, 3),
    ).double()


def losses(model: nn.Module, count: int = 3) -> Iterator[Tensor]:
    torch.manual_seed(1)
    for _ in range(count):
        x = torch.randn(32, 2, 4, 4, dtype=torch.float64).cumsum(-1)
        yield model(x).logsumexp(1).mean()


OPTIONS = st.builds(
    Option, st.just("any"), st.integers(1, 40), st.floats(0, 100), flops=st.integers(1, 40)
)
SIDES = st.lists(st.lists(OPTIONS, min_size=1, max_size=5), min_size=1, max_size=5)


@given(sides=SIDES, costs=st.sampled_from([["numbers"], ["numbers", "flops"]]), data=st.data())
def test_no_choice_loses_less_whose_shares_of_the_limits_are_a_little_smaller(
    sides: list[list[Option]], costs: list[str], data: st.DataObject
) -> None:
    """Every choice is tried; with one limit those count that leave out the largest option."""
    table = {(f"{i}", 0): side for i, side in enumerate(sides)}
    choices = [
        ({cost: sum(getattr(o, cost) for o in each) for cost in costs}, sum(o.nats for o in each))
        for each in itertools.product(*sides)
    ]
    limits = {
        cost: data.draw(st.sampled_from(sorted({used[cost] for used, _ in choices})))
        for cost in costs
    }
    try:
        chosen = fewest_nats(table, limits).values()
    except ValueError:
        assert costs != ["numbers"]  # two limits may be short where the least of each is not
        return
    assert all(sum(getattr(o, cost) for o in chosen) <= limits[cost] for cost in costs)
    lost = sum(o.nats for o in chosen)

    def share(used: dict[str, float]) -> float:
        return sum(used[cost] / limits[cost] for cost in costs)

    largest = max(share({c: getattr(o, c) for c in costs}) for side in sides for o in side)
    others = [nats for used, nats in choices if share(used) <= 1 - largest + 1e-12]
    assert not others or lost <= min(others) * (1 + 1e-9) + 1e-9


def test_what_costs_least_need_not_be_the_same_for_every_limit() -> None:
    table = {("w", 0): [Option("a", 1, 5.0, flops=8), Option("b", 4, 4.0, flops=2)]}
    for limits, spec in (
        ({"numbers": 2, "flops": 9}, "a"),
        ({"numbers": 4, "flops": 7}, "b"),
        ({"numbers": 4, "flops": 9}, "b"),
    ):
        assert fewest_nats(table, limits)["w", 0].spec == spec
    with pytest.raises(ValueError, match="at least 4 numbers, got 3 numbers"):
        fewest_nats(table, {"numbers": 3, "flops": 4})


def test_nats_are_those_of_the_averaged_curvature() -> None:
    model = nn.Linear(5, 3, bias=False).double()
    torch.manual_seed(0)
    X = torch.randn(64, 5, dtype=torch.float64).cumsum(1)
    passes = (model(x).square().sum(1).mean() for x in X.split(32))
    choice = choose_structures(model, passes, budget=9.0, candidates=["diagonal"])
    B = 2 * model(X).detach()
    S_K, S_C = X.mT @ X / 64, B.mT @ B / 64
    for option, S, other in zip(choice.sides["weight"], (S_K, S_C), (3, 5), strict=True):
        c = 1e-3 * S.diagonal().mean()
        expected = other * divergence(inverse_root("diagonal", S, c), S, c)
        torch.testing.assert_close(torch.tensor(option.nats).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("budget", [0.8, 1.0, 1.5])
def test_it_stays_within_the_budget_and_is_what_is_stored(budget: float) -> None:
    model = network()
    choice = choose_structures(model, losses(model), budget=budget)
    assert list(choice) == ["0.weight", "3.weight", "5.weight"]
    weights = sum(p.numel() for i in (0, 3, 5) for p in model[i].parameters())
    norms = 2 * len(choice)  # of directions
    assert choice.numbers <= choice.limits["numbers"] == int((2 * budget - 1) * weights) - norms
    optimizer = SINGD(model, structures=choice)
    next(losses(model)).backward()
    optimizer.step()
    stored = 0
    for p in model.parameters():
        entry = optimizer.state[p]
        stored += sum(t.numel() for name in ("K", "C") for t in entry.get(name, []))
    assert stored == choice.numbers
    assert f"{choice.nats:.4g} nats lost" in str(choice)


def test_more_numbers_lose_fewer_nats() -> None:
    model = network()
    lost = [choose_structures(model, losses(model), budget=b).nats for b in (0.7, 0.8, 1.0, 6.0)]
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] < 1e-6 < lost[0]


def test_the_model_is_as_it_was() -> None:
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    choose_structures(model, losses(model))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_fewer_operations_lose_more_nats() -> None:
    model = network()
    weights = sum(p.numel() for i in (0, 3, 5) for p in model[i].parameters())
    before = math.inf
    for share in (0.1, 0.3, 1.0):
        budget = {"state": 9.0, "flops": share}
        choice = choose_structures(model, losses(model), budget=budget, T=5)
        assert choice.nats < before
        before = choice.nats
        passes = 6 * 32 * (weights + 3 * model[0].weight.numel() + 3 * 4)  # at four positions
        assert choice.limits["flops"] == pytest.approx(share * passes)
        assert SINGD(model, structures=choice, T=5).plan().flops <= choice.used("flops")
        assert choice.used("flops") <= share * passes
        assert f"of {share * passes:,.0f} flops" in str(choice)


def foreseen(self: OneProcess, demands: Mapping[WeightMatrix, Demand]) -> dict[WeightMatrix, float]:
    """Bytes that grow with statistics, and by a jump where C mixes rows."""
    return {
        m: d.statistics / d.interval + d.numbers * d.itemsize * (d.mixed_rows != 1)
        for m, d in demands.items()
    }


@settings(max_examples=6, deadline=None)
@given(share=st.floats(0.01, 3.0), T=st.sampled_from([1, 20]))
def test_no_more_is_sent_than_a_limit(share: float, T: int) -> None:
    """Whatever is sent by structures, which is no sum over sides here."""
    model = network()
    weights = 8 * sum(p.numel() for i in (0, 3, 5) for p in model[i].parameters())

    def sent(choice: StructureChoice) -> float:
        parts = SINGD(model, structures=choice, T=T)._parts
        groups = parts.parameters.preconditioned()
        demands = {m: parts.store.demand(m, group) for m, group in groups.items()}
        return sum(parts.placement.foresee(demands).values())

    with mock.patch.object(OneProcess, "foresee", foreseen):
        free = choose_structures(model, losses(model), budget=9.0, T=T)
        budget = {"state": 9.0, "sent": share}
        try:
            choice = choose_structures(model, losses(model), budget=budget, T=T)
        except ValueError as error:
            short = rf"at least [\d,]+ bytes sent in a step, got {share * weights:,.0f}$"
            assert re.search(short, str(error))  # noqa: PT017 - may be raised
            plain = dict.fromkeys(free, ("diagonal", "diagonal"))
            assert sent(plain) > share * weights
            return
        assert sent(choice) <= share * weights
        assert choice.nats >= free.nats - 1e-9
        assert (dict(choice) == dict(free)) == (sent(free) <= share * weights)


def test_one_process_sends_nothing() -> None:
    model = network()
    free = choose_structures(model, losses(model), budget=1.0)
    limited = choose_structures(model, losses(model), budget={"state": 1.0, "sent": 1e-9})
    assert limited == free


def test_wide_sides_are_diagonal() -> None:
    model = network()
    choice = choose_structures(model, losses(model), max_dim=12, budget=3.0)
    assert choice["3.weight"][0] == "diagonal"  # 16 inputs and the bias
    assert choice["5.weight"][1] != "diagonal" or choice.sides["5.weight"][1].nats < 1e-6


def test_errors_say_what_was_expected() -> None:
    model = network()
    with pytest.raises(ValueError, match="losses: expected at least one, got none"):
        choose_structures(model, [])
    warned = pytest.warns(UserWarning, match="without its module being called")
    with pytest.raises(ValueError, match="one after the other"), warned:
        choose_structures(model, list(losses(model)))
    for some, got in (([(1, 2)], "tuple"), ([1.0], "float"), ([torch.ones(2)], r"\[2\]")):
        with pytest.raises(TypeError, match=f"losses: expected tensors of one number, got {got}"):
            choose_structures(model, some)
    with pytest.raises(ValueError, match="T: expected an integer >= 1, got 0"):
        choose_structures(model, [], T=0)
    with pytest.raises(TypeError, match="losses: expected several losses"):
        choose_structures(model, next(losses(model)))
    with pytest.raises(ValueError, match=r"budget: expected at least \d+ numbers, got"):
        choose_structures(model, losses(model), budget=0.01)
    with pytest.raises(ValueError, match="losses: expected finite passes"):
        choose_structures(model, (float("nan") * loss for loss in losses(model)))
    for candidates in ("dense", ()):
        with pytest.raises(ValueError, match="candidates: expected one spec or more, got"):
            choose_structures(model, losses(model), candidates=candidates)
