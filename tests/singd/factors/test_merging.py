"""The penalty and merged weights against quadratic models written out."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from singd import SINGD
from singd.factors import KroneckerFactors, calibrate, ewc, merge
from tests.singd.factors.networks import (
    calibrated,
    convolutions,
    data,
    fisher,
    network,
    random_factors,
    trained,
)

STRUCTURES = ["dense", "diagonal", "block_diagonal(2)", "lower_triangular"]
Case = tuple[list[nn.Linear], list[KroneckerFactors], torch.Generator]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Layers without a bias, and factors of each."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    d_out, d_in = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    models, factors = [], []
    for _ in range(draw(st.integers(1, 3))):
        model = nn.Linear(d_in, d_out, bias=False).double()
        with torch.no_grad():
            model.weight.normal_(generator=generator)
        structures = [draw(st.sampled_from(STRUCTURES)) for _ in range(2)]
        one = random_factors((d_out, d_in), structures, generator)
        models.append(model)
        factors.append(calibrated({"weight": one}, draw(st.integers(1, 20))))
    return models, factors, generator


@given(case=cases())
def test_the_penalty_is_the_quadratic_model(case: Case) -> None:
    models, factors, generator = case
    model, F = models[0], fisher(factors[0]["weight"])
    penalty = ewc(factors[0], model)
    assert penalty() == 0
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.normal_(generator=generator)
    delta = (model.weight.detach() - before).flatten()
    value = penalty()
    torch.testing.assert_close(value, delta @ F @ delta / 2)
    value.backward()
    assert model.weight.grad is not None
    torch.testing.assert_close(model.weight.grad.flatten(), F @ delta)


@given(case=cases(), given_weights=st.booleans())
def test_merged_weights_are_at_the_minimum_of_the_sum(case: Case, given_weights: bool) -> None:
    models, factors, generator = case
    c = torch.rand(len(models), generator=generator, dtype=torch.float64) + 0.1
    shares = c if given_weights else torch.tensor([one.samples for one in factors]).double()
    merged = merge(models, factors, c.tolist() if given_weights else None)["weight"]
    Fs = [s * fisher(one["weight"]) for s, one in zip(shares, factors, strict=True)]
    right = sum(F @ m.weight.detach().flatten() for F, m in zip(Fs, models, strict=True))
    expected = torch.linalg.solve(torch.stack(Fs).sum(0), right)
    torch.testing.assert_close(merged.flatten(), expected, rtol=1e-6, atol=1e-7)


def test_models_of_every_kind_of_layer_are_merged() -> None:
    one, loader = convolutions(), data(2, 3, 3)
    factors = calibrate(trained(one, loader, layers="all"), one, loader, refit=0.1)
    same = merge([one, one], [factors, factors])
    for name, p in one.named_parameters():
        torch.testing.assert_close(same[name], p.detach())
    other = copy.deepcopy(one)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1 * torch.randn_like(p))
    theirs = calibrate(factors, other, loader, refit=0.1)
    merged = merge([one, other], [factors, theirs], [1.0, 1e9])
    for name, p in other.named_parameters():
        torch.testing.assert_close(merged[name], p.detach(), rtol=1e-4, atol=1e-4)
    one.load_state_dict(merged, strict=False)
    penalty = ewc(theirs, other)
    penalty().backward()
    assert all(p.grad is not None for p in other.parameters())


def test_an_optimizer_trains_under_the_penalty() -> None:
    """With a backward pass of its own it leaves the layers to the method, and holds weights."""

    def moved(strength: float) -> float:
        model, loader = network(), data(4)
        factors = calibrate(trained(model, loader), model, loader, refit=0.1)
        penalty = ewc(factors, model)
        with SINGD(model, lr=1e-2, T=1) as optimizer:
            for x, y in loader * 20:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), (y + 1) % 3).backward()
                (strength * penalty()).backward()
                optimizer.step()
            assert not any(group["handed_over"] for group in optimizer.param_groups)
        return float(penalty().detach())

    assert moved(1e3) < 0.1 * moved(0.0)


def test_what_cannot_be_merged_says_why() -> None:
    model, loader = network(), data(4)
    factors = calibrate(trained(model, loader), model, loader, refit=0.1)
    with pytest.raises(ValueError, match="as many factors as 2 models, got 1"):
        merge([model, model], [factors])
    with pytest.raises(ValueError, match="weights: expected 1 numbers, got 2"):
        merge([model], [factors], [1.0, 2.0])
    with pytest.raises(ValueError, match="weights: expected a number in"):
        merge([model], [factors], [0.0])
    part = KroneckerFactors({"0.weight": factors["0.weight"]})
    with pytest.raises(ValueError, match="factors of the same weights, got others"):
        merge([model, model], [factors, part])
    for call in (lambda f: ewc(f, model), lambda f: merge([model], [f])):
        with pytest.raises(ValueError, match="expected factors with the scale"):
            call(trained(model, loader))


def test_a_sum_of_quadratic_models_with_one_minimum_is_not_searched() -> None:
    model, loader = network(), data(4)
    factors = calibrate(trained(model, loader), model, loader, refit=0.1)
    merged: dict[str, Tensor] = merge([model], [factors])
    assert all(torch.equal(merged[name], p) for name, p in model.named_parameters())
