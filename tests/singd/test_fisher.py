"""Kronecker factors against a dense Fisher from per-sample gradients, where they are exact.

The loss terms are all pairs of an input and a unit vector, ``<e_j, f(x)>``: their gradients are
the rows of the Jacobian, so their Fisher is the Gauss-Newton matrix of a square loss. For linear
nets it is a Kronecker product in two settings (Eschenhagen et al., arXiv 2311.00636): a term for
every position (KFAC-expand), or for the mean over positions (KFAC-reduce).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from singd.layers import find_layer
from tests.singd.dense import relative
from tests.singd.paper import KFAC, SINGD

F64 = torch.float64
Model = nn.Sequential


def linear(d_in: int, d_out: int, bias: bool) -> nn.Linear:
    return nn.Linear(d_in, d_out, bias=bias, dtype=F64)


NETS: dict[str, tuple[Model, tuple[int, ...]]] = {
    "one layer": (Model(linear(4, 3, False)), (4,)),
    "one layer with bias": (Model(linear(4, 3, True)), (4,)),
    "deep linear": (Model(linear(4, 5, True), linear(5, 3, False), linear(3, 2, True)), (4,)),
    "positions": (Model(linear(4, 3, True)), (6, 4)),
    "deep, positions": (Model(linear(4, 5, False), linear(5, 2, True)), (2, 3, 4)),
}
CONVOLUTIONS: dict[str, tuple[Model, tuple[int, ...]]] = {
    "convolution": (Model(nn.Conv2d(2, 3, 2, padding=1, dtype=F64)), (2, 3, 4)),
    "strided": (Model(nn.Conv1d(2, 3, 3, stride=2, bias=False, dtype=F64)), (2, 9)),
    "two groups": (Model(nn.Conv2d(4, 6, 2, groups=2, dtype=F64)), (4, 3, 3)),
    "depthwise": (Model(nn.Conv1d(3, 3, 2, groups=3, bias=False, dtype=F64)), (3, 5)),
}
EVERY = NETS | CONVOLUTIONS


def terms_of(output: Tensor, approximation: str, convolution: bool) -> Tensor:
    """The model's output for one sample as ``[positions, d]``, one position under reduce."""
    rows = output.flatten(1).T if convolution else output.reshape(-1, output.shape[-1])
    return rows.mean(0, keepdim=True) if approximation == "reduce" else rows


def all_pairs(X: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Every input with every unit vector."""
    return X.repeat_interleave(d, 0), torch.eye(d, dtype=F64).repeat(len(X), 1)


def dense_fisher(model: Model, X: Tensor, index: int, approximation: str, conv: bool) -> Tensor:
    """Mean outer product of the gradients of all terms for one layer, ``[..., d, d]``.

    The gradient of a layer is ``[..., d_out, d_in]``, its bias the last column, flattened.
    """
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    layer = model[index]
    names = [f"{index}.weight"] + ([f"{index}.bias"] if layer.bias is not None else [])

    def term(own: dict[str, Tensor], x: Tensor, e: Tensor) -> Tensor:
        output = functional_call(model, parameters | own, (x[None],))[0]
        return (terms_of(output, approximation, conv) * e).sum()

    own = {name: parameters[name] for name in names}
    count, d = terms_of(model(X[:1])[0], approximation, conv).shape
    e = torch.eye(count * d, dtype=F64).reshape(-1, count, d)
    x, e = X.repeat_interleave(len(e), 0), e.repeat(len(X), 1, 1)
    grads = vmap(grad(term), in_dims=(None, 0, 0))(own, x, e)
    reader: Any = find_layer(layer)
    G = torch.stack([reader.to_matrix(layer, g) for g in grads[names[0]]])
    if len(names) > 1:
        G = torch.cat([G, grads[names[1]].reshape(*G.shape[:-1], 1)], -1)
    flat = G.flatten(-2).movedim(0, -1)  # [..., d_out d_in, terms]
    return flat @ flat.mT / flat.shape[-1]


def backward(model: Model, X: Tensor, approximation: str, conv: bool) -> None:
    """One backward pass of the mean over all terms, as a user would write it."""
    count, d = terms_of(model(X[:1])[0], approximation, conv).shape
    x, e = all_pairs(X, d)
    output = model(x)
    rows = torch.stack([terms_of(o, approximation, conv) for o in output])
    ((rows * e[:, None]).sum() / (len(x) * count)).backward()


def factors(name: str, model: Model, X: Tensor, approximation: str, method: str) -> list[Any]:
    """``(S_K, S_C)`` of every layer as an optimizer sees them."""
    average = "batch" if approximation == "reduce" else "batch+sequence"
    options = {"T": 1, "loss_average": average, "kfac_approx": approximation, "damping": 0.0}
    if method == "KFAC":
        optimizer: Any = KFAC(model, lr_cov=1.0, **options | {"damping": 1.0})
    else:
        optimizer = SINGD(model, lr_cov=1.0, kfac_like=True, factor_clip=None, **options)
    backward(model, X, approximation, name in CONVOLUTIONS)
    optimizer.step()
    states = [optimizer.state[layer.weight] for layer in model]
    optimizer.close()
    if method == "KFAC":
        return [(*s["S_K"], *s["S_C"]) for s in states]
    # From the identity, with beta_1 = 1 and no damping: K = I - (S - I) / 2.
    return [tuple(3 * torch.eye(t.shape[-1]) - 2 * t for t in (*s["K"], *s["C"])) for s in states]


@pytest.mark.parametrize("method", ["KFAC", "IKFAC"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("name", EVERY)
def test_factors_are_exact_for_linear_nets(name: str, approximation: str, method: str) -> None:
    model, shape = EVERY[name]
    X, conv = torch.randn(5, *shape, dtype=F64), name in CONVOLUTIONS
    for p in model.parameters():
        p.grad = None
    expected = [dense_fisher(model, X, i, approximation, conv) for i in range(len(model))]
    for (S_K, S_C), fisher in zip(
        factors(name, model, X, approximation, method), expected, strict=True
    ):
        product = torch.einsum("...ij,...kl->...ikjl", S_C, S_K).flatten(-4, -3).flatten(-2)
        assert relative(product, fisher) < 1e-10


def test_factors_are_not_exact_for_a_nonlinear_net() -> None:
    """Else the comparison could not fail."""
    model = Model(linear(4, 5, True), nn.Tanh(), linear(5, 3, True))
    X = torch.randn(5, 4, dtype=F64)
    fisher = dense_fisher(model, X, 0, "expand", False)
    optimizer = KFAC(model, lr_cov=1.0, damping=1.0, T=1)
    backward(model, X, "expand", False)
    optimizer.step()
    state = optimizer.state[model[0].weight]
    assert relative(torch.kron(*state["S_C"], *state["S_K"]), fisher) > 1e-3


def test_one_sample_is_its_own_outer_product() -> None:
    """With a single row the empirical Fisher itself is a Kronecker product, for any net."""
    model = Model(linear(4, 5, True), nn.Tanh(), linear(5, 3, True))
    optimizer = KFAC(model, lr_cov=1.0, damping=1.0, T=1)
    model(torch.randn(1, 4, dtype=F64)).exp().sum().backward()
    for layer in (model[0], model[2]):
        layer.full = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1).flatten()
    optimizer.step()
    for layer in (model[0], model[2]):
        state = optimizer.state[layer.weight]
        outer = torch.outer(layer.full, layer.full)
        assert relative(torch.kron(*state["S_C"], *state["S_K"]), outer) < 1e-10
