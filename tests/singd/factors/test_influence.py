"""Influence against models that were trained again without a sample."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from singd.factors import KroneckerFactors, calibrate, influence, posterior
from tests.singd.factors.networks import data, network, trained

TAU = 0.8


def regression(d_out: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    X = torch.randn(30, 4, dtype=torch.float64, generator=generator)
    Y = torch.randn(30, d_out, dtype=torch.float64, generator=generator)
    return nn.Sequential(nn.Linear(4, d_out)).double(), X, Y


def fit(model: nn.Sequential, X: Tensor, Y: Tensor) -> None:
    """The minimum of half the squared error and ``TAU / 2`` times the squared weights."""
    A = torch.cat([X, torch.ones(len(X), 1, dtype=X.dtype)], 1)
    W = torch.linalg.solve(A.T @ A + TAU * torch.eye(5, dtype=X.dtype), A.T @ Y)
    with torch.no_grad():
        model[0].weight.copy_(W[:-1].T)
        model[0].bias.copy_(W[-1])


def exact(model: nn.Sequential, X: Tensor, Y: Tensor, likelihood: str) -> KroneckerFactors:
    other = nn.Sequential(nn.Linear(4, model[0].out_features)).double()
    loader = data(4, classes=model[0].out_features)
    factors = trained(other, loader, structures=("dense", "dense"))
    return calibrate(factors, model, [(X, Y)], likelihood=likelihood, refit=1e-9)


def half_squares(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().sum() / 2


def test_of_a_regression_it_is_exact_but_for_the_leverage() -> None:
    """The change is ``J V g / (1 - h)`` with the leverage ``h`` of the sample."""
    model, X, Y = regression(2)
    fit(model, X, Y)
    found = posterior(exact(model, X, Y, "regression"), model, TAU)
    queries = torch.randn(5, 4, dtype=torch.float64)
    values = influence(found, (X, Y), (queries,), loss=half_squares, chunk=7)
    assert values.shape == (30, 5, 2)
    leverage = found.predict(X).variance[:, :1, None]
    before = model(queries).detach()
    for i in range(30):
        rest = torch.arange(30) != i
        fit(model, X[rest], Y[rest])
        change = model(queries).detach() - before
        torch.testing.assert_close(values[i] / (1 - leverage[i]), change, rtol=1e-5, atol=1e-7)


def test_of_a_classifier_it_follows_training_again() -> None:
    """With the whole Hessian in place of its Kronecker product the correlation is 0.98."""
    torch.manual_seed(0)
    X = torch.randn(40, 4, dtype=torch.float64)
    y = (X @ torch.randn(4, 3, dtype=torch.float64) + torch.randn(40, 3)).argmax(1)
    model = nn.Sequential(nn.Linear(4, 3)).double()
    queries = torch.randn(6, 4, dtype=torch.float64)

    def train(kept: Tensor) -> Tensor:
        optimizer = torch.optim.LBFGS(
            model.parameters(), max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            squares = sum(p.square().sum() for p in model.parameters())
            loss = F.cross_entropy(model(X[kept]), y[kept], reduction="sum") + TAU / 2 * squares
            loss.backward()
            return loss

        optimizer.step(closure)
        return model(queries).detach().log_softmax(-1)

    everything = torch.ones(40, dtype=torch.bool)
    before = train(everything)
    found = posterior(exact(model, X, y, "classification"), model, TAU)

    def log_probabilities(model: nn.Module, x: Tensor) -> Tensor:
        return model(x)[0].log_softmax(-1)

    values = influence(found, (X, y), (queries,), output=log_probabilities)
    changes = torch.stack([train(everything & (torch.arange(40) != i)) - before for i in range(40)])
    both = torch.stack([values.flatten(), changes.flatten()])
    assert both.corrcoef()[0, 1] > 0.9
    slope = float((values * changes).sum() / values.square().sum())
    assert 0.8 < slope < 1.5


def test_it_is_the_gradient_times_the_covariance() -> None:
    """Of a network with several layers, and of a number as output."""
    model, loader = network(), data(4)
    factors = calibrate(trained(model, loader), model, loader, refit=1e-3)
    found = posterior(factors, model, TAU)
    x, y = loader[0]
    values = influence(found, (x, y), (x, y), output=lambda m, x, y: F.cross_entropy(m(x), y))
    assert values.shape == (7, 7)
    expected = torch.zeros(7, 7, dtype=torch.float64)
    for name, R in found.roots.items():
        layer, rows = model[int(name[0])], []
        for i in range(7):
            loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
            by = torch.autograd.grad(loss, [layer.weight, layer.bias])
            rows.append(torch.cat([by[0], by[1][:, None]], 1).flatten())
        g = torch.stack(rows)
        expected += g @ R.to_dense() @ R.to_dense().mT @ g.mT
    torch.testing.assert_close(values, expected)
    assert values[0, 0] == pytest.approx(float(expected[0, 0]))


def test_what_are_no_samples_is_said() -> None:
    model, loader = network(), data(4)
    found = posterior(calibrate(trained(model, loader), model, loader, refit=1e-3), model, TAU)
    x, y = loader[0]
    with pytest.raises(ValueError, match="samples: expected a tuple of tensors with a sample"):
        influence(found, (x[:0], y[:0]), (x,))
    with pytest.raises(ValueError, match="queries: expected a tuple of tensors with a sample"):
        influence(found, (x, y), x)
