"""laplace-torch and curvlinops do with the factors what we do."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from singd.factors import calibrate, posterior
from singd.factors.interop import to_curvlinops, to_laplace
from tests.singd.factors.networks import convolutions, data, network, trained

BLOCKED = ["laplace", "curvlinops", "curvlinops._torch_base"]


def test_laplace_has_the_posterior() -> None:
    """Of layers without biases, whose covariance with the weights is left out there."""
    pytest.importorskip("laplace")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)
    ).double()
    loader, tau = data(4), 0.7
    factors = calibrate(trained(model, loader), model, loader, refit=1e-3)
    ours = posterior(factors, model, tau)
    prior = torch.tensor(tau, dtype=torch.float64)
    theirs = to_laplace(factors, model, 3, log_likelihood=-7.5, prior_precision=prior)
    expected = float(ours.log_marginal_likelihood(-7.5))
    assert float(theirs.log_marginal_likelihood()) == pytest.approx(expected)
    x = torch.randn(6, 4, dtype=torch.float64)
    mean, covariance = theirs._glm_predictive_distribution(x)
    predicted = ours.predict(x)
    torch.testing.assert_close(mean.detach(), predicted.mean)
    torch.testing.assert_close(covariance.detach(), predicted.covariance)
    torch.testing.assert_close(theirs(x, link_approx="probit").detach(), predicted.probabilities())


def test_laplace_has_the_curvature_that_it_would_find() -> None:
    laplace = pytest.importorskip("laplace")
    model, loader = network(), data(4)
    factors = calibrate(trained(model, loader, structures=("dense", "dense")), model, loader,
                        refit=1e-9)  # fmt: skip
    found = to_laplace(factors, model, 3)
    theirs = laplace.KronLaplace(model, "classification")
    samples = torch.utils.data.TensorDataset(*(torch.cat(t) for t in zip(*loader, strict=True)))
    theirs.fit(torch.utils.data.DataLoader(samples, batch_size=12))
    for ours, other in zip(found.H_facs.kfacs, theirs.H_facs.kfacs, strict=True):
        a, b = (_kron(blocks) for blocks in (ours, other))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def _kron(blocks: list[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.kron(*blocks)


@pytest.mark.parametrize("inverse", [False, True])
def test_curvlinops_has_the_damped_curvature(inverse: bool) -> None:
    pytest.importorskip("curvlinops")
    model, loader = network(), data(4)
    factors = calibrate(trained(model, loader), model, loader, refit=0.1)
    F = to_curvlinops(factors, model, inverse=inverse)
    X = [torch.randn(*p.shape, 2, dtype=torch.float64) for p in model.parameters()]
    Y = F @ X
    for i in (0, 2):
        one = factors[f"{i}.weight"]
        R = one.root.to_dense()
        S = R @ R.mT if inverse else torch.linalg.inv(R @ R.mT)
        joined = torch.cat([X[i], X[i + 1][:, None]], 1)
        expected = (S @ joined.flatten(0, 1)).reshape(joined.shape)
        torch.testing.assert_close(torch.cat([Y[i], Y[i + 1][:, None]], 1), expected)
    assert F.to_scipy().shape == (43, 43)


def test_what_cannot_be_converted_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loader = network(), data(4)
    factors = calibrate(trained(model, loader), model, loader, refit=0.1)
    for name in BLOCKED:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match="laplace-torch: expected it to be installed"):
        to_laplace(factors, model, 3)
    with pytest.raises(ModuleNotFoundError, match="curvlinops-for-pytorch: expected it to be"):
        to_curvlinops(factors, model)


def test_laplace_has_no_groups() -> None:
    pytest.importorskip("laplace")
    model, loader = convolutions(), data(2, 3, 3)
    factors = calibrate(trained(model, loader), model, loader, refit=0.1)
    with pytest.raises(ValueError, match=r"whole weights without groups, got 0\.weight"):
        to_laplace(factors, model, 3)
    some = network()
    del factors
    factors = calibrate(trained(some, data(4)), some, data(4), refit=0.1)
    part = type(factors)({"0.weight": factors["0.weight"]}, 12)
    with pytest.raises(ValueError, match=r"got none of 2\.weight, 2\.bias"):
        to_laplace(part, some, 3)
