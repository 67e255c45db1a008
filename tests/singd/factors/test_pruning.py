"""The surgeon's scores and moves against constrained minima written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from singd.factors import (
    KroneckerFactors,
    calibrate,
    conjugate,
    keep,
    prune,
    row_scores,
    weight_scores,
)
from tests.singd.factors.networks import (
    calibrated,
    convolutions,
    data,
    fisher,
    network,
    random_factors,
    trained,
)

STRUCTURES = ["dense", "diagonal", "block_diagonal(2)", "lower_triangular", "hierarchical(1, 1)"]
Case = tuple[nn.Linear, KroneckerFactors, torch.Generator]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A layer without a bias, and factors of it."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    d_out, d_in = 2 * draw(st.integers(1, 3)), draw(st.integers(2, 5))
    model = nn.Linear(d_in, d_out, bias=False).double()
    with torch.no_grad():
        model.weight.normal_(generator=generator)
    structures = [draw(st.sampled_from(STRUCTURES)) for _ in range(2)]
    one = random_factors((d_out, d_in), structures, generator)
    return model, calibrated({"weight": one}), generator


def minimum(F: Tensor, w: Tensor, removed: Tensor) -> tuple[Tensor, Tensor]:
    """``w + delta`` with zeros where ``removed`` of least ``delta^T F delta / 2``, and that."""
    delta = torch.where(removed, -w, 0.0)
    kept = ~removed
    if kept.any():
        delta[kept] = -torch.linalg.solve(F[kept][:, kept], F[kept][:, removed] @ delta[removed])
    return w + delta, delta @ F @ delta / 2


@given(case=cases(), sparsity=st.floats(0, 1))
def test_pruned_weights_are_at_the_constrained_minimum(case: Case, sparsity: float) -> None:
    model, factors, generator = case
    W = model.weight.detach().clone()
    mask = torch.rand(W.shape, generator=generator) >= sparsity
    expected, rise = minimum(fisher(factors["weight"]), W.flatten(), ~mask.flatten())
    found = prune(factors, model, {"weight": mask})
    torch.testing.assert_close(model.weight.detach().flatten(), expected, rtol=1e-6, atol=1e-7)
    assert found == pytest.approx(float(rise), rel=1e-6, abs=1e-9)
    assert not model.weight[~mask].any()


@given(case=cases())
def test_scores_are_what_the_removal_of_one_number_costs(case: Case) -> None:
    model, factors, _ = case
    scores, W = weight_scores(factors, model)["weight"], model.weight.detach()
    F = fisher(factors["weight"])
    for i in range(W.numel()):
        removed = torch.arange(W.numel()) == i
        _, rise = minimum(F, W.flatten(), removed)
        torch.testing.assert_close(scores.flatten()[i], rise)


@given(case=cases(), size=st.sampled_from([1, 2]))
def test_scores_of_rows_are_what_their_removal_costs(case: Case, size: int) -> None:
    """Of groups of rows too: heads."""
    model, factors, _ = case
    scores, W = row_scores(factors, model, size)["weight"], model.weight.detach().clone()
    F = fisher(factors["weight"])
    assert len(scores) == len(W) // size
    for i, score in enumerate(scores):
        rows = torch.arange(len(W)) // size == i
        after, rise = minimum(F, W.flatten(), rows[:, None].expand_as(W).flatten())
        torch.testing.assert_close(score, rise)
    mask = torch.arange(len(scores)) != len(scores) - 1
    found = prune(factors, model, {"weight": mask})
    torch.testing.assert_close(model.weight.detach().flatten(), after, rtol=1e-6, atol=1e-7)
    assert found == pytest.approx(float(scores[-1]), rel=1e-6)


@given(case=cases())
def test_without_an_update_the_others_stay(case: Case) -> None:
    model, factors, generator = case
    W = model.weight.detach().clone()
    mask = torch.rand(W.shape, generator=generator) >= 0.5
    w = torch.where(mask, 0.0, W).flatten()
    found = prune(factors, model, {"weight": mask}, update=False)
    assert torch.equal(model.weight.detach(), torch.where(mask, W, 0.0))
    assert found == pytest.approx(float(w @ fisher(factors["weight"]) @ w / 2))


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    sparsity=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_the_highest_scores_of_all_are_kept(sizes: list[int], sparsity: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {f"{i}": torch.rand(n, 2, generator=generator) for i, n in enumerate(sizes)}
    masks = keep(scores, sparsity)
    kept = torch.cat([scores[k][m] for k, m in masks.items()])
    lost = torch.cat([scores[k][~m] for k, m in masks.items()])
    assert len(lost) == round(sparsity * 2 * sum(sizes))
    if len(kept) and len(lost):
        assert kept.min() >= lost.max()


def test_the_loss_rises_as_expected() -> None:
    """Of a regression by one layer, which is quadratic, with its whole curvature."""
    torch.manual_seed(0)
    X = torch.randn(50, 4, dtype=torch.float64) @ torch.randn(4, 4, dtype=torch.float64)
    Y = X @ torch.randn(4, 2, dtype=torch.float64) + torch.randn(50, 2, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(4, 2)).double()
    ones = torch.cat([X, torch.ones(50, 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(ones, Y).solution
    with torch.no_grad():
        model[0].weight.copy_(solution[:-1].T)
        model[0].bias.copy_(solution[-1])

    def loss() -> float:
        return float((model(X).detach() - Y).square().sum()) / 100

    factors = trained(network_of(model), data(4, classes=2), structures=("dense", "dense"))
    factors = calibrate(factors, model, [(X, Y)], likelihood="regression", refit=1e-9)
    before = loss()
    rise = prune(factors, model, keep(weight_scores(factors, model), 0.5))
    assert rise > 0.01
    assert loss() - before == pytest.approx(rise, rel=1e-4)


def network_of(model: nn.Sequential) -> nn.Sequential:
    copy = nn.Sequential(nn.Linear(4, 2)).double()
    copy.load_state_dict(model.state_dict())
    return copy


def test_every_kind_of_layer_is_pruned() -> None:
    model, loader = convolutions(), data(2, 3, 3)
    factors = calibrate(trained(model, loader, layers="all"), model, loader, refit=0.1)
    scores = weight_scores(factors, model)
    shapes = {name: [*model.get_parameter(name.partition("[")[0]).shape] for name in factors}
    shapes |= {f"5.in_proj_weight[{part}]": [4, 4] for part in "qkv"}
    assert {name: [*t.shape] for name, t in scores.items()} == shapes
    prune(factors, model, keep(scores, 0.5))
    zeros = sum(int((model.get_parameter(k.partition("[")[0]) == 0).sum()) for k in factors)
    packed = int((model.get_parameter("5.in_proj_weight") == 0).sum())  # counted for q, k and v
    assert zeros - 2 * packed == round(0.5 * sum(t.numel() for t in scores.values()))
    heads = row_scores(factors, model, {f"5.in_proj_weight[{part}]": 2 for part in "qkv"})
    assert {t.shape for t in heads.values()} == {(2,)}
    prune(factors, model, {name: torch.tensor([True, False]) for name in heads})
    attention = model[5]
    assert isinstance(attention, nn.MultiheadAttention)
    for rows in (attention.in_proj_weight, attention.in_proj_bias):
        assert rows is not None
        parts = rows.unflatten(0, (3, 2, 2))
        assert not parts[:, 1].any()
        assert parts[:, 0].any()


def test_what_cannot_be_pruned_says_why() -> None:
    model, loader = network(), data(4)
    factors = calibrate(trained(model, loader), model, loader, refit=0.1)
    with pytest.raises(ValueError, match="sparsity: expected a number in"):
        keep({"a": torch.ones(1)}, 1.5)
    with pytest.raises(ValueError, match="scores: expected those of one weight or more"):
        keep({}, 0.5)
    with pytest.raises(ValueError, match=r"masks: expected names among 0\.weight, 2\.weight, got"):
        prune(factors, model, {"1.weight": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"expected truth values, got torch\.float32"):
        prune(factors, model, {"0.weight": torch.ones(5, 4)})
    with pytest.raises(ValueError, match=r"shape \[5, 4\], or \[5\] for rows, got \[3\]"):
        prune(factors, model, {"0.weight": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="expected a divisor of 5 rows, got 2"):
        row_scores(factors, model, 2)
    with pytest.raises(ValueError, match="size: expected names among"):
        row_scores(factors, model, {"3.weight": 1})
    for function in (weight_scores, row_scores):
        with pytest.raises(ValueError, match=f"{function.__name__}: expected factors with the sc"):
            function(trained(model, loader), model)


def test_conjugate_gradients_say_if_they_do_not_converge() -> None:
    A = torch.diag(torch.logspace(0, 12, 30, dtype=torch.float64))
    ones = torch.ones(30, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="expected 1e-09 in 5 steps, got"):
        conjugate.solve(lambda x: A @ x, ones, ones, limit=5)
    with pytest.raises(RuntimeError, match="got nan"):
        conjugate.solve(lambda x: A @ x * torch.nan, ones, ones)
    assert not conjugate.solve(lambda x: A @ x, 0 * ones, ones).any()


def test_masks_of_weights_leave_biases_and_those_of_rows_do_not() -> None:
    model, loader = network(), data(4)
    factors = calibrate(trained(model, loader), model, loader, refit=0.1)
    bias = model[0].bias.detach().clone()
    prune(factors, model, {"0.weight": torch.zeros(5, 4, dtype=torch.bool)}, update=False)
    assert not model[0].weight.any()
    assert torch.equal(model[0].bias, bias)
    kept = torch.arange(5) != 2
    prune(factors, model, {"0.weight": kept}, update=False)
    assert torch.equal(model[0].bias, torch.where(kept, bias, 0.0))
