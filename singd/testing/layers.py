"""Checks for a :class:`singd.Layer` of your own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from singd.layers import OPTIONAL, find_layer
from singd.layers.base import Layer


def check_layer(module: nn.Module, x: torch.Tensor, layer: Layer | None = None) -> None:
    """Check that ``layer`` reads ``module`` as a matrix product.

    A random gradient is sent through the output. What the layer makes of the input and of that
    gradient must give back the gradients autograd finds: ``sum over rows of B A^T`` of the weight,
    ``sum over rows of B`` of a bias that joins it.

    Args:
        module: A module with ``weight`` and optionally ``bias``, best in float64.
        x: An input of it.
        layer: How to read it; the registered one if ``None``.

    Raises:
        AssertionError: If a shape or a gradient is not what it must be.
        TypeError: If no layer is registered for ``module``.
    """
    layer = find_layer(module, tuple(OPTIONAL)) if layer is None else layer
    if layer is None:
        raise TypeError(f"check_layer: no layer is registered for {type(module).__name__}")
    weight: Any = getattr(module, layer.weight)
    bias: Any = getattr(module, layer.bias, None)
    output = module(x)
    g = torch.randn_like(output)
    wanted = torch.autograd.grad(output, [weight] if bias is None else [weight, bias], g)

    matrix = layer.to_matrix(module, wanted[0])
    *batch, d_out, d_in = layer.shape(module)
    _equal("to_matrix(weight).shape", list(matrix.shape), [*batch, d_out, d_in])
    _close("from_matrix(to_matrix(weight))", layer.from_matrix(module, matrix), wanted[0])

    grads = layer.grads(module, g)
    _equal("grads(g).shape", list(grads.shape), [*batch, *grads.shape[-3:-1], d_out])
    B = grads.flatten(-3, -2).mT
    if bias is not None and layer.joins_bias:
        _close("sum over rows of B", B.sum(-1).reshape(bias.shape), wanted[1])
    if layer.input_structure is None:
        inputs = layer.inputs(module, x.detach())
        _equal("inputs(x).shape", list(inputs.shape), [*batch, *grads.shape[-3:-1], d_in])
        A = inputs.flatten(-3, -2).mT
        _close("sum over rows of B A^T", B @ A.mT, matrix)
        columns, rows = layer.columns(module, x.detach(), "expand", ones=False)
        _equal("number of columns(x)", [rows], [A.shape[-1]])
        _close("gram of columns(x)", columns @ columns.mT, A @ A.mT)

    u = torch.randn(d_in, 3, dtype=weight.dtype, device=weight.device)
    v = torch.randn(d_out, 3, dtype=weight.dtype, device=weight.device)
    right, left = layer.inputs_along(module, x.detach(), u), layer.grads_along(module, g, v)
    for name, product in (("inputs_along(x, u)", right), ("grads_along(g, v)", left)):
        _equal(f"{name}.shape", list(product.shape), [*batch, *grads.shape[-3:-1], 3])
    both = (left * right).sum((-3, -2))
    _close("inputs_along(x, u) grads_along(g, v)", both, (matrix @ u * v).sum(-2))


def _equal(name: str, got: list[int], expected: list[int]) -> None:
    if got != expected:
        raise AssertionError(f"{name}: expected {expected}, got {got}")


def _close(name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 1e3 * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(
        got, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}"
    )
