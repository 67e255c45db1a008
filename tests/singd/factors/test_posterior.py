"""The posterior against Gaussians written out: covariance, samples, predictions, evidence."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from singd.factors import KroneckerFactors, calibrate, posterior
from singd.factors.posterior import Predictive
from tests.singd.factors.networks import convolutions, data, moments, network, trained

N = 12  # samples of data(4)
FITTED: dict[str, KroneckerFactors] = {}
STRUCTURES = ["dense", "diagonal", "block_diagonal(2)", "lower_triangular"]


def fitted(model: nn.Module, structure: str = "dense", refit: float = 1e-3) -> KroneckerFactors:
    """Factors that hold the curvature, as far as their structure can."""
    factors = trained(model, data(4), structures=(structure, structure))
    return calibrate(factors, model, data(4), refit=refit)


def written_out(factors: KroneckerFactors, tau: float) -> dict[str, Tensor]:
    """``(N S_C (x) S_K + tau I)^-1`` of every weight, of ``S = (K K^T)^-1 - d I``."""
    found = {}
    for name, one in factors.items():
        assert one.calibration is not None
        S_K, S_C = (
            torch.linalg.inv(F.to_dense() @ F.to_dense().mT) - d * torch.eye(F.n, dtype=d.dtype)
            for F, d in zip((one.K, one.C), one.calibration.damping, strict=True)
        )
        F = N * torch.kron(S_C, S_K)
        found[name] = torch.linalg.inv(F + tau * torch.eye(len(F), dtype=F.dtype))
    return found


@given(structure=st.sampled_from(STRUCTURES), log_tau=st.floats(-3, 3))
def test_roots_are_those_of_the_covariance(structure: str, log_tau: float) -> None:
    model, tau = network(), 10**log_tau
    factors = fitted(model, structure) if structure not in FITTED else FITTED[structure]
    FITTED[structure] = factors
    found = posterior(factors, model, tau)
    for name, covariance in written_out(factors, tau).items():
        R = found.roots[name].to_dense()
        torch.testing.assert_close(R @ R.mT, covariance, rtol=1e-6, atol=1e-9 / tau)


def test_the_curvature_of_dense_factors_is_that_of_the_data() -> None:
    model, tau = network(), 0.5
    found = posterior(fitted(model), model, tau)
    for name, (S_K, S_C) in moments(model, inputs(), "classification").items():
        F = N * torch.kron(S_C, S_K)
        covariance = torch.linalg.inv(F + tau * torch.eye(len(F), dtype=F.dtype))
        R = found.roots[name].to_dense()
        torch.testing.assert_close(R @ R.mT, covariance)


def inputs() -> Tensor:
    return torch.cat([x for x, _ in data(4)])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_without_a_prior_samples_are_two_structured_products(structure: str) -> None:
    model = network()
    factors = fitted(model, structure, refit=0.3)
    found = posterior(factors, model, n_data=40)
    drawn = found.sample(generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    for name, one in factors.items():
        W = model.get_parameter(name)
        bias = model.get_parameter(str(one.bias))
        Z = torch.empty(W.numel() + len(bias), 1, dtype=W.dtype).normal_(generator=generator)
        Z = Z.reshape(one.shape)
        D = one.C.to_dense() @ Z @ one.K.to_dense().mT / 40**0.5
        torch.testing.assert_close(drawn[name], W + D[:, :-1])
        torch.testing.assert_close(drawn[str(one.bias)], bias + D[:, -1])


def test_samples_have_the_covariance() -> None:
    model = nn.Sequential(nn.Linear(2, 2)).double()
    loader = data(2, classes=2)
    found = posterior(calibrate(trained(model, loader), model, loader, refit=0.1), model, 1.0)
    generator = torch.Generator().manual_seed(0)
    drawn = [found.sample(generator=generator) for _ in range(4000)]
    vectors = torch.stack([torch.cat([d["0.weight"], d["0.bias"][:, None]], 1) for d in drawn])
    R = found.roots["0.weight"].to_dense()
    torch.testing.assert_close(vectors.flatten(1).T.cov(), R @ R.mT, rtol=0.2, atol=0.02)
    torch.testing.assert_close(vectors.mean(0), found.mean["0.weight"], rtol=0, atol=0.05)


def test_predictions_are_those_of_the_linearised_model() -> None:
    model, x = network(), torch.randn(5, 4, dtype=torch.float64)
    factors = fitted(model)
    found = posterior(factors, model, 0.7).predict(x, chunk=2)
    f = model(x)
    covariance = torch.zeros(5, 3, 3, dtype=torch.float64)
    for name, Sigma in written_out(factors, 0.7).items():
        layer = model[int(name[0])]
        J = torch.zeros(5, 3, len(Sigma), dtype=torch.float64)
        for n in range(5):
            for c in range(3):
                by = torch.autograd.grad(f[n, c], [layer.weight, layer.bias], retain_graph=True)
                J[n, c] = torch.cat([by[0], by[1][:, None]], 1).flatten()
        covariance += J @ Sigma @ J.mT
    torch.testing.assert_close(found.mean, f.detach())
    torch.testing.assert_close(found.covariance, covariance)
    torch.testing.assert_close(found.variance, covariance.diagonal(dim1=-2, dim2=-1))


def test_a_wide_gaussian_of_logits_has_less_certain_classes() -> None:
    mean = torch.tensor([[3.0, 0.0]])
    sure, unsure = (Predictive(mean, s * torch.eye(2)[None]).probabilities() for s in (0.0, 9.0))
    torch.testing.assert_close(sure, mean.softmax(-1))
    scale = (1 + math.pi / 8 * 9) ** 0.5
    torch.testing.assert_close(unsure, (mean / scale).softmax(-1))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_evidence_and_its_gradient_are_those_of_the_gaussian(structure: str) -> None:
    model = network()
    factors = fitted(model, structure)
    taus = {"0.weight": 0.3, "2.weight": 5.0}
    given = {k: torch.tensor(t, dtype=torch.float64, requires_grad=True) for k, t in taus.items()}
    found = posterior(factors, model, given)
    expected = torch.tensor(-7.5, dtype=torch.float64)
    ours = {k: torch.tensor(t, dtype=torch.float64, requires_grad=True) for k, t in taus.items()}
    for name, tau in ours.items():
        F = torch.linalg.inv(written_out(factors, 1.0)[name])
        eye = torch.eye(len(F), dtype=F.dtype)
        W = found.mean[name]
        logdet = torch.linalg.slogdet(F - eye + tau * eye).logabsdet
        expected = expected + 0.5 * (len(F) * tau.log() - logdet - tau * W.square().sum())
    evidence = found.log_marginal_likelihood(-7.5)
    torch.testing.assert_close(evidence, expected)
    evidence.backward()
    expected.backward()
    for name in taus:
        torch.testing.assert_close(given[name].grad, ours[name].grad)
    again = posterior(factors, model, 1.0).with_prior_precision(taus)
    torch.testing.assert_close(again.log_marginal_likelihood(-7.5), evidence)


def test_every_kind_of_layer_has_samples_and_predictions() -> None:
    """Groups, packed weights, normalization, weights of attention."""
    model, loader = convolutions(), data(2, 3, 3)
    factors = calibrate(trained(model, loader, layers="all"), model, loader, refit=1e-2)
    x = loader[0][0]
    for prior in (None, 2.0):
        found = posterior(factors, model, prior)
        values = found.weights.values()
        again = found.weights.into(found.mean, values)
        assert all(torch.equal(again[name], p) for name, p in values.items())
        drawn = found.sample()
        assert {name: p.shape for name, p in drawn.items()} == {
            name: p.shape for name, p in model.named_parameters()
        }
        assert all(not torch.equal(drawn[name], p) for name, p in values.items())
        assert functional_call(model, drawn, (x,)).isfinite().all()
        Gaussians = found.predict(x)
        torch.testing.assert_close(Gaussians.mean, model(x).detach())
        sample = torch.stack(
            [functional_call(model, shrunk(found.sample(), values), (x,)) for _ in range(2000)]
        )
        variance = (sample - Gaussians.mean).square().mean(0) / 1e-10
        torch.testing.assert_close(variance.detach(), Gaussians.variance, rtol=0.25, atol=0.0)


def shrunk(drawn: dict[str, Tensor], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """So near to the mean that the model is linear."""
    return {name: p + 1e-5 * (drawn[name] - p) for name, p in values.items()}


def test_what_makes_no_posterior_says_why() -> None:
    model = network()
    factors = fitted(model)
    with pytest.raises(ValueError, match="prior_precision: expected a number in"):
        posterior(factors, model, 0.0)
    with pytest.raises(ValueError, match=r"expected one for 2\.weight, got 0\.weight"):
        posterior(factors, model, {"0.weight": 1.0})
    with pytest.raises(ValueError, match="n_data: expected an integer >= 1, got 0"):
        posterior(factors, model, n_data=0)
    folded = posterior(factors, model)
    with pytest.raises(ValueError, match="x: expected one sample or more, got none"):
        folded.predict(inputs()[:0])
    with pytest.raises(ValueError, match="expected a posterior with a prior_precision"):
        folded.log_marginal_likelihood(0.0)
    with pytest.raises(ValueError, match="expected a posterior with a prior_precision"):
        folded.with_prior_precision(1.0)
    with pytest.raises(ValueError, match="posterior: expected factors with the scale"):
        posterior(trained(model, data(4)), model, 1.0)
