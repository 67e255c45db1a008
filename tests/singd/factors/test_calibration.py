"""Calibration against curvature written out: scale, damping and residual of every factor."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from singd.factors import Calibration, KroneckerFactors, WeightFactors, calibrate, posterior
from singd.factors.calibration import require_calibrated
from structured import inverse_root, parse
from tests.singd.factors.networks import convolutions, data, moments, network, trained

STRUCTURES = ["dense", "diagonal", "block_diagonal(2)", "lower_triangular", "hierarchical(1, 1)"]


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_refitted_factors_are_the_best_roots(structure: str, likelihood: str) -> None:
    model, loader = network(), data(4)
    factors = trained(model, loader, structures=(structure, structure))
    fitted = calibrate(factors, model, loader, likelihood=likelihood, refit=0.1)
    assert fitted.samples == 12
    expected = moments(model, torch.cat([x for x, _ in loader]), likelihood)
    for name, one in fitted.items():
        for member, S, d in zip(
            (one.K, one.C), expected[name], calibration(one).damping, strict=True
        ):
            torch.testing.assert_close(d, 0.1 * S.trace() / len(S))
            best = inverse_root(structure, S, d)
            torch.testing.assert_close(member.to_dense(), best.to_dense())
        for residual in calibration(one).residual:
            assert residual < 1e-8


def calibration(one: WeightFactors) -> Calibration:
    assert one.calibration is not None
    return one.calibration


def use_twice(model: nn.Sequential, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The first weight has a part in the outputs that no hook sees."""
    x, _ = batch
    hidden = model[1](model[0](x)) + nn.functional.linear(x, model[0].weight)
    out: Tensor = model[2](hidden)
    return out


@given(
    structure=st.sampled_from(STRUCTURES),
    scale=st.floats(-6, 6).map(lambda x: 10**x),
    damping=st.floats(0.01, 1.0),
)
def test_scale_and_damping_of_a_factor_at_rest_are_found(
    structure: str, scale: float, damping: float
) -> None:
    """Any multiple of the best root becomes that root again, with its damping."""
    model, loader = network(), data(4)
    factors = trained(model, loader, steps=1, structures=(structure, structure))
    best = calibrate(factors, model, loader, refit=damping)
    scaled = {k: replace(one, K=scale * one.K, C=one.C / scale) for k, one in best.items()}
    again = calibrate(KroneckerFactors(scaled), model, loader)
    for name, one in again.items():
        for found, true in zip((one.K, one.C), (best[name].K, best[name].C), strict=True):
            torch.testing.assert_close(found.to_dense(), true.to_dense(), rtol=1e-5, atol=1e-7)
        for found, true in zip(
            calibration(one).damping, calibration(best[name]).damping, strict=True
        ):
            torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-7)
        for residual in calibration(one).residual:
            assert residual < 1e-5


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_residual_is_the_least_one(structure: str) -> None:
    """No other scale or damping of a trained factor comes closer to the curvature."""
    model, loader = network(), data(4)
    factors = trained(model, loader, structures=(structure, structure))
    found = calibrate(factors, model, loader)
    expected = moments(model, torch.cat([x for x, _ in loader]), "classification")
    for name, one in found.items():
        sides = zip((factors[name].K, factors[name].C), expected[name], range(2), strict=True)
        for trained_one, S, side in sides:
            numbers = (
                getattr(calibration(one), key)[side] for key in ("scale", "damping", "residual")
            )
            a, d, residual = numbers
            K = trained_one.to_dense()
            H = parse(structure)(K.shape[-1], dtype=K.dtype).project(K.mT @ S @ K)
            Q = parse(structure)(K.shape[-1], dtype=K.dtype).project(K.mT @ K)

            def distance(a: Tensor, b: Tensor, H: object = H, Q: object = Q) -> Tensor:
                rest = (a * H + b * Q).add_scaled_identity(-1.0)  # type: ignore[operator]
                return rest.frobenius_norm() / rest.n**0.5

            torch.testing.assert_close(distance(a, a * d), residual)
            assert 0 < residual < 1
            for s, t in [(1.01, 1), (0.99, 1), (1, 1.01), (1, 0.99)]:
                assert distance(s * a, t * a * d) >= residual - 1e-12
            new = one.K if side == 0 else one.C
            torch.testing.assert_close(new.to_dense(), a.sqrt() * K)


def test_every_kind_of_layer_is_calibrated() -> None:
    model, loader = convolutions(), data(2, 3, 3)
    factors = trained(model, loader, layers="all")
    assert {"0.weight", "3.weight", "4.weight", "5.in_proj_weight[q]"} <= {*factors}
    found = calibrate(factors, model, loader)
    assert found.is_calibrated
    assert not factors.is_calibrated
    assert calibration(found["0.weight"]).scale[0].shape == (2,)
    fitted = calibrate(factors, model, loader, refit=1e-2)
    for one in fitted.values():
        assert all((t < 1e-6).all() for t in calibration(one).residual)


def test_random_columns_have_the_exact_curvature_as_mean() -> None:
    model, loader = network(), data(4)
    factors = trained(model, loader)
    generator = torch.Generator().manual_seed(3)
    for likelihood in ("classification", "regression"):
        exact = calibrate(factors, model, loader, likelihood=likelihood, refit=0.1)
        drawn = calibrate(
            factors, model, loader * 100, likelihood=likelihood, refit=0.1, columns=5,
            generator=generator,
        )  # fmt: skip
        for name, one in exact.items():
            for A, B in ((one.K, drawn[name].K), (one.C, drawn[name].C)):
                torch.testing.assert_close(A.to_dense(), B.to_dense(), rtol=0.1, atol=0.05)


def test_the_model_is_left_as_it_was() -> None:
    model, loader = network(), data(4)
    factors = trained(model, loader)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model[1].eval()
    calibrate(factors, model, loader)
    assert model.training
    assert not model[1].training
    assert not any(module._forward_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_factors_without_the_scale_are_refused_and_bad_ones_reported() -> None:
    model, loader = network(), data(4)
    factors = trained(model, loader, steps=1)
    with pytest.raises(ValueError, match="posterior: expected factors with the scale"):
        require_calibrated(factors, "posterior")
    with pytest.warns(UserWarning, match=r"residual of at most 0.3 .* got 0.weight"):
        require_calibrated(calibrate(factors, model, loader), "posterior")
    with warnings.catch_warnings(action="error"):
        require_calibrated(calibrate(factors, model, loader, refit=0.1), "posterior")


def test_frozen_weights_and_empty_batches_make_no_difference() -> None:
    model, loader = network(), data(4)
    factors = trained(model, loader)
    expected = calibrate(factors, model, loader)
    model[0].requires_grad_(False)
    x, y = loader[0]
    found = calibrate(factors, model, [(x[:0], y[:0]), *loader])
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
    assert found.samples == expected.samples
    for name, one in found.items():
        assert torch.equal(one.K.to_dense(), expected[name].K.to_dense())
        assert torch.equal(one.C.to_dense(), expected[name].C.to_dense())


def test_what_cannot_be_calibrated_says_why() -> None:
    model, loader = network(), data(4)
    factors = trained(model, loader)
    with pytest.raises(FloatingPointError, match=r"0\.weight: its .* not finite"):
        calibrate(factors, model, [*loader, (torch.nan * loader[0][0], loader[0][1])])
    with pytest.raises(ValueError, match="at least one batch, got none"):
        calibrate(factors, model, [])
    with pytest.raises(ValueError, match="likelihood: expected one of 'classification'"):
        calibrate(factors, model, loader, likelihood="poisson")
    with pytest.raises(ValueError, match="refit: expected a number"):
        calibrate(factors, model, loader, refit=-1.0)
    with (
        pytest.warns(UserWarning, match="AdamW trains it instead"),
        pytest.raises(ValueError, match=r"expected the uses of 0\.weight that its layer describes"),
    ):
        calibrate(factors, model, loader, forward=use_twice)
    with pytest.raises(ValueError, match="expected curvature on the side of C, got zero"):
        calibrate(
            factors,
            model,
            loader,
            forward=lambda m, batch: 0 * m(batch[0]),
            likelihood="regression",
        )
    with pytest.raises(ValueError, match=r"expected a weight 2\.weight, got 0\.weight"):
        calibrate(factors, nn.Sequential(model[0]), loader)
    other = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)).double()
    with pytest.raises(ValueError, match=r"2\.weight: expected shape and bias"):
        calibrate(factors, other, loader)


def test_factors_in_bfloat16_are_calibrated_in_float32() -> None:
    """Rounded to bfloat16 the best factors would not be the best ones."""
    model, loader = network().float(), [(x.float(), y) for x, y in data(4)]
    half = (torch.bfloat16, torch.bfloat16)
    factors = trained(model, loader, preconditioner_dtype=half)
    assert factors["0.weight"].K.dtype is torch.bfloat16
    fitted = calibrate(factors, model, loader, refit=1e-2)
    again = calibrate(fitted, model, loader)
    for one in again.values():
        assert one.K.dtype is torch.float32
        assert max(calibration(one).worst_residual) < 1e-3


def test_a_bias_that_was_not_trained_is_not_folded_in() -> None:
    model, loader = network(), data(4)
    model[0].bias.requires_grad_(False)
    factors = trained(model, loader)
    model[0].bias.requires_grad_(True)
    fitted = calibrate(factors, model, loader, refit=0.1)
    assert (fitted["0.weight"].bias, fitted["0.weight"].shape) == (None, (5, 4))
    drawn = posterior(fitted, model, 1.0).sample()
    assert torch.equal(drawn["0.bias"], model[0].bias)
    assert not torch.equal(drawn["2.bias"], model[2].bias)
