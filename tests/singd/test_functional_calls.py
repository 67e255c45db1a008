"""Modules that are called with other weights, and gradients that come from elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from tests.singd.paper import KFAC, SINGD
from tests.singd.runs import batches, distance, mean_loss, mlp, snapshot

Weights = dict[str, Tensor]


def transformed(model: nn.Module, X: Tensor, y: Tensor) -> Weights:
    """Gradients of a functional transform, in which no hook is called."""

    def loss(weights: Weights) -> Tensor:
        return mean_loss(functional_call(model, weights, (X,)), y)

    found: Weights = grad(loss)({k: p.detach() for k, p in model.named_parameters()})
    return found


def of_a_copy(model: nn.Module, X: Tensor, y: Tensor) -> Weights:
    """Gradients of a copy of the model, as a worker has."""
    other = copy.deepcopy(model)
    mean_loss(other(X), y).backward()
    return {k: p.grad for k, p in other.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("gradients", [transformed, of_a_copy])
@pytest.mark.parametrize("given", [SINGD, KFAC])
def test_gradients_from_elsewhere_are_told_of(
    given: type, gradients: Callable[[nn.Module, Tensor, Tensor], Weights]
) -> None:
    model = mlp()
    optimizer = given(model, T=1, lr=0.05)
    X, y = batches(1)[0]
    found = gradients(model, X, y)
    for name, p in model.named_parameters():
        p.grad = found[name]
    with pytest.warns(UserWarning, match=r"0\.weight, 2\.weight: no backward pass was seen"):
        optimizer.step()


def test_a_layer_that_waits_with_an_old_gradient_is_not_told_of() -> None:
    model = mlp()
    optimizer = SINGD(model, T=1, lr=0.05)
    X, y = batches(1)[0]
    mean_loss(model(X), y).backward()
    for _ in range(2):  # the second step finds the gradient of the first
        optimizer.step()


def test_a_call_with_other_weights_leaves_no_trace() -> None:
    runs = []
    for extra in (0.0, 1.0):
        model = mlp()
        optimizer = SINGD(model, T=1, lr=0.05)
        others = {k: (2 * p).detach().requires_grad_() for k, p in model.named_parameters()}
        for X, y in batches(3):
            optimizer.zero_grad()
            loss = mean_loss(model(X), y)
            if extra:
                loss = loss + mean_loss(functional_call(model, others, (3 * X,)), y)
            loss.backward()
            optimizer.step()
        runs.append(snapshot(model, optimizer))
    assert distance(runs[1], runs[0]) == 0.0


def test_weights_made_of_the_models_count_where_they_explain_the_gradient() -> None:
    """As in first-order meta-learning: the query's gradient is that of the weight."""
    model = mlp()
    optimizer = SINGD(model, T=1, lr=0.05)
    for X, y in batches(3):
        optimizer.zero_grad()
        own = dict(model.named_parameters())
        loss = mean_loss(functional_call(model, own, (X,)), y)
        steps = torch.autograd.grad(loss, list(own.values()))
        tuned = {k: p - 0.1 * g for (k, p), g in zip(own.items(), steps, strict=True)}
        mean_loss(functional_call(model, tuned, (X,)), y).backward()
        optimizer.step()
    assert optimizer.param_groups[0]["handed_over"] == ()
    assert all("K" in optimizer.state[model[i].weight] for i in (0, 2))
