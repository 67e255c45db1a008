"""Structures that are chosen in training: within the budget, as from the same batches before it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from singd import SINGD, choose_structures
from singd.capture.weight_matrix import WeightMatrix
from singd.methods.automatic import UPDATES
from singd.methods.structure_choice import DAMPING
from singd.placement.replicated import OneProcess
from tests.singd.runs import stored


class Attention(nn.Module):
    """Three matrices of one weight, with the same structures."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (-1, 8))
        out: Tensor = self.mix(x, x, x)[0].flatten(-2)
        return out


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 24), nn.LayerNorm(24), nn.Tanh(), Attention(), nn.Linear(24, 5)
    ).double()


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    for seed in itertools.count():
        made = torch.Generator().manual_seed(seed)
        X = torch.randn(32, 16, generator=made, dtype=torch.float64).cumsum(1)
        yield X, torch.randint(5, (32,), generator=made)


def train(model: nn.Module, optimizer: Any, steps: int, start: int = 0) -> list[float]:
    losses = []
    for X, y in itertools.islice(batches(), start, start + steps):
        optimizer.zero_grad()
        loss = cross_entropy(model(X), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@settings(max_examples=8)
@given(budget=st.one_of(st.floats(0.7, 4.0), st.integers(12_000, 80_000)))
def test_what_is_stored_fits_the_budget(budget: float) -> None:
    model = network()
    optimizer = SINGD(model, structures="auto", budget=budget, T=1)
    train(model, optimizer, UPDATES)
    plan = optimizer.plan()
    rows = [row for row in plan.rows if row.rule == "SINGD"]
    ours = sum(row.state_bytes for row in rows)
    weights = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("1."))
    assert ours <= (budget if isinstance(budget, int) else 2 * 8 * budget * weights)
    assert stored(optimizer) == plan.state_bytes
    assert "nats lost" in str(plan)


@settings(max_examples=4)  # operations of every pair are counted by running them
@given(share=st.floats(0.1, 3.0), T=st.integers(1, 4))
def test_what_is_computed_fits_a_limit_of_the_passes(share: float, T: int) -> None:
    model = network()
    optimizer = SINGD(model, structures="auto", budget={"state": 4.0, "flops": share}, T=T)
    train(model, optimizer, UPDATES)
    weights = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("1."))
    positions = sum(p.numel() for n, p in model.named_parameters() if n.startswith("3."))
    assert optimizer.plan().flops <= 6 * 32 * share * (weights + 2 * positions)
    assert optimizer.param_groups[0]["structures"] != "auto"


def test_they_are_those_that_are_chosen_before_training() -> None:
    """Where weights do not move, the same batches have the same curvature."""
    model = network()
    losses = (cross_entropy(model(X), y) for X, y in itertools.islice(batches(), UPDATES))
    choice = choose_structures(model, losses, budget=1.1)
    optimizer = SINGD(model, structures="auto", budget=1.1, T=1, lr=0.0, momentum=0.5)
    train(model, optimizer, UPDATES)
    (group,) = optimizer.param_groups
    assert group["structures"] == dict(choice)
    assert len({*map(str, choice.values())}) > 1
    for name, lost in group["nats_lost"].items():
        K, C = choice.sides[name]
        assert lost == pytest.approx(K.nats + C.nats, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"alpha1": 0.5}, {"kfac_like": True}])
def test_factors_begin_as_those_of_singd(options: dict[str, Any]) -> None:
    """Of one batch again and again the averages are its statistics."""
    X, y = next(batches())

    def run(structures: Any, steps: int) -> SINGD:
        model = network()
        optimizer = SINGD(model, structures=structures, T=1, lr=0.0, lr_cov=0.2, **options)
        for _ in range(steps):
            optimizer.zero_grad()
            cross_entropy(model(X), y).backward()
            optimizer.step()
        return optimizer

    automatic = run("auto", UPDATES)
    fixed = run(automatic.param_groups[0]["structures"], 1)
    pairs = zip(automatic.state.values(), fixed.state.values(), strict=True)
    for one, other in pairs:
        members = {name for name, value in other.items() if isinstance(value, list)}
        assert members == {name for name, value in one.items() if isinstance(value, list)}
        for name in members:
            torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-9)


def test_until_then_directions_are_those_of_diagonals() -> None:
    model = nn.Linear(6, 4, bias=False).double()
    optimizer = SINGD(model, structures="auto", T=10, lr=1.0, momentum=0.0)
    X = torch.randn(32, 6, dtype=torch.float64)
    before = model.weight.detach().clone()
    model(X).square().sum(1).mean().backward()
    grad = model.weight.grad.clone()
    optimizer.step()
    B = 2 * X @ before.mT
    S_K, S_C = X.square().mean(0), B.square().mean(0)
    D = grad / (S_C / S_C.mean() + DAMPING)[:, None] / (S_K / S_K.mean() + DAMPING)
    expected = before - 0.2 * D / D.square().mean().sqrt()
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("saved", [1, UPDATES - 1, UPDATES, UPDATES + 3])
def test_it_resumes_before_and_after_the_choice(saved: int) -> None:
    model = network()
    optimizer = SINGD(model, structures="auto", T=1)
    train(model, optimizer, saved)
    other = copy.deepcopy(model)
    resumed = SINGD(other, structures="auto", T=1)
    resumed.load_state_dict(optimizer.state_dict())
    assert train(other, resumed, 6, saved) == train(model, optimizer, 6, saved)
    assert resumed.param_groups[0]["structures"] == optimizer.param_groups[0]["structures"]
    assert str(resumed.plan()) == str(optimizer.plan())


def test_groups_of_other_budgets_choose_by_themselves() -> None:
    model = network()
    groups = [
        {"params": model[0].parameters(), "budget": 0.8},
        {"params": model[4].parameters(), "budget": 4.0},
    ]
    optimizer = SINGD(model, groups, structures="auto", T=1)
    train(model, optimizer, UPDATES + 1)
    lost = [sum(group["nats_lost"].values()) for group in optimizer.param_groups]
    assert lost[0] > 1.0
    assert lost[1] < 1e-6


def test_a_skipped_step_is_no_part_of_the_averages() -> None:
    def first_averages(skip: bool) -> list[Tensor]:
        model = network()
        optimizer = SINGD(model, structures="auto", T=1, lr=0.0)
        X, y = next(batches())
        for factor in [float("nan"), 1.0] if skip else [1.0]:
            optimizer.zero_grad()
            (factor * cross_entropy(model(X), y)).backward()
            optimizer.step()
        return list(optimizer.state[model[0].weight]["S_C"])

    for one, other in zip(first_averages(False), first_averages(True), strict=True):
        torch.testing.assert_close(one, other)


@settings(max_examples=8)
@given(
    kinds=st.lists(st.sampled_from(["batch", "nan", "nothing", "zero", "empty"]), max_size=6),
    T=st.sampled_from([1, 10]),
)
def test_only_batches_with_a_curvature_are_averaged(kinds: list[str], T: int) -> None:
    """Whatever else the first steps are, the choice is that of as many batches, before training."""
    model = network()
    losses = (cross_entropy(model(X), y) for X, y in itertools.islice(batches(), UPDATES))
    choice = choose_structures(model, losses, budget=1.1)
    optimizer = SINGD(model, structures="auto", budget=1.1, T=T, lr=0.0)
    (group,) = optimizer.param_groups
    data = batches()
    factor = {"batch": 1.0, "nan": float("nan"), "zero": 0.0}
    for kind in [*kinds, *["batch"] * (UPDATES + 1)]:
        assert group["structures"] == "auto"
        optimizer.zero_grad()
        if kind == "empty":
            model(torch.zeros(0, 16, dtype=torch.float64)).sum().backward()
        elif kind != "nothing":
            X, y = next(data) if kind == "batch" else next(batches())
            (factor[kind] * cross_entropy(model(X), y)).backward()
        optimizer.step()
        if group["structures"] != "auto":
            break
    assert group["structures"] == dict(choice)
    for name, lost in group["nats_lost"].items():
        assert lost == pytest.approx(choice.nats_of(name), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("skipped", range(5))
def test_skipped_steps_delay_the_choice_by_themselves_alone(skipped: int) -> None:
    model = network()
    optimizer = SINGD(model, structures="auto", T=10)
    for X, y in itertools.islice(batches(), skipped):
        (float("nan") * cross_entropy(model(X), y)).backward()
        optimizer.step()
        optimizer.zero_grad()
    (group,) = optimizer.param_groups
    train(model, optimizer, UPDATES - 1)
    assert group["structures"] == "auto"
    train(model, optimizer, 1)
    assert group["structures"] != "auto"


def test_structures_may_be_chosen_again() -> None:
    model = network()
    optimizer = SINGD(model, structures="auto", budget=1.1, T=1, lr=0.0)
    (group,) = optimizer.param_groups
    train(model, optimizer, UPDATES)
    chosen = group["structures"]
    train(model, optimizer, UPDATES)
    group["structures"] = "auto"
    train(model, optimizer, UPDATES)
    assert group["structures"] == chosen


def test_a_weight_that_nothing_passed_through_begins_afresh_and_is_named() -> None:
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]).double()
    optimizer = SINGD(model, structures="auto", T=1)

    def run(steps: int, *, both: bool) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            out = model[0](torch.randn(8, 4).double())
            (model[1](out) if both else out).square().sum(1).mean().backward()
            optimizer.step()

    with pytest.warns(UserWarning, match=r"^1\.weight: without gradients when structures were"):
        run(UPDATES, both=False)
    run(3, both=True)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_the_plan_says_that_structures_are_yet_to_be_chosen() -> None:
    row = SINGD(nn.Linear(3, 2), structures="auto").plan().rows[0]
    assert row.structures == "auto, averages: dense, dense"


def test_they_are_asked_for_where_the_optimizer_is_made() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="not made with structures='auto', got 'auto'"):
        SINGD(model, [{"params": model.parameters(), "structures": "auto"}])


def test_what_is_sent_whatever_is_chosen_changes_nothing() -> None:
    def chosen(budget: Any) -> Any:
        optimizer = SINGD(model := network(), structures="auto", T=1, budget=budget)
        train(model, optimizer, UPDATES)
        return optimizer.param_groups[0]["structures"]

    def foreseen(
        self: OneProcess, demands: Mapping[WeightMatrix, Any]
    ) -> dict[WeightMatrix, float]:
        return dict.fromkeys(demands, 1e6)

    short = r"at least 6,000,000 bytes sent in a step, got [\d,]+: all take .* that send the least"
    with mock.patch.object(OneProcess, "foresee", foreseen), pytest.warns(UserWarning, match=short):
        limited = chosen({"state": 1.1, "sent": 0.5})
    assert limited == chosen(1.1)


def test_a_budget_that_is_too_small_is_said() -> None:
    model = network()
    optimizer = SINGD(model, structures="auto", T=1, budget=0.51)
    train(model, optimizer, UPDATES - 1)
    with pytest.warns(UserWarning, match=r"budget: expected at least \d+ numbers .*, got \d+"):
        train(model, optimizer, 1)
    cheapest = {spec for both in optimizer.param_groups[0]["structures"].values() for spec in both}
    assert cheapest == {"diagonal"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structures": "dense"}, "structures: expected a pair, a mapping or 'auto', got 'dense'"),
        ({"structures": "auto", "budget": 0.0}, "budget: expected a multiple .*, got 0.0"),
        ({"structures": "auto", "budget": float("inf")}, "budget: expected a multiple .*, got inf"),
        ({"structures": "auto", "budget": 2}, "budget: .* bytes .* of 1000 or more.*, got 2"),
        ({"structures": "auto", "budget": {"state": 0}}, "budget: expected a multiple .*, got 0"),
        ({"structures": "auto", "budget": {"flops": -1}}, "budget: expected flops as .*, got -1"),
        ({"structures": "auto", "budget": {"time": 1}}, "budget: .* 'flops' or 'sent', got .*time"),
        ({"structures": "auto", "budget": {"sent": 0}}, "budget: expected sent as a .*, got 0"),
        (
            {"structures": "auto", "budget": {"sent": True}},
            "budget: .* bytes of the gradients .*True",
        ),
        ({"structures": "auto", "budget": {}}, "budget: expected limits of .*, got {}"),
        ({"structures": "auto", "budget": "2 GB"}, "budget: .*, got '2 GB'"),
        ({"structures": "auto", "T": 0}, "T: expected an integer >= 1, got 0"),
    ],
)
def test_errors_say_what_was_expected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SINGD(network(), **options)
