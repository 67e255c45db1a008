"""Checks for a :class:`singd.Layer` of your own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from singd.layers import Layer, find_layer


def check_layer(module: nn.Module, x: torch.Tensor, layer: Layer | None = None) -> None:
    """Check that ``layer`` reads ``module`` as a matrix product.

    A random gradient is sent through the output. What the layer makes of the input and of that
    gradient must give back the gradients autograd finds: ``sum over rows of B A^T`` of the weight,
    ``sum over rows of B`` of the bias.

    Args:
        module: A module with ``weight`` and optionally ``bias``, best in float64.
        x: An input of it.
        layer: How to read it; the registered one if ``None``.

    Raises:
        AssertionError: If a shape or a gradient is not what it must be.
        TypeError: If no layer is registered for ``module``.
    """
    layer = find_layer(module) if layer is None else layer
    if layer is None:
        raise TypeError(f"check_layer: no layer is registered for {type(module).__name__}")
    weight: Any = module.weight
    bias: Any = getattr(module, "bias", None)
    output = module(x)
    g = torch.randn_like(output)
    wanted = torch.autograd.grad(output, [weight] if bias is None else [weight, bias], g)

    matrix = layer.to_matrix(module, wanted[0])
    *batch, d_out, d_in = layer.shape(module)
    _equal("to_matrix(weight).shape", list(matrix.shape), [*batch, d_out, d_in])
    _close("from_matrix(to_matrix(weight))", layer.from_matrix(module, matrix), wanted[0])

    inputs, grads = layer.inputs(module, x.detach()), layer.grads(module, g)
    _equal("inputs(x).shape", list(inputs.shape), [*batch, *grads.shape[-3:-1], d_in])
    _equal("grads(g).shape", list(grads.shape), [*batch, *inputs.shape[-3:-1], d_out])
    A, B = inputs.flatten(-3, -2).mT, grads.flatten(-3, -2).mT
    _close("sum over rows of B A^T", B @ A.mT, matrix)
    if bias is not None:
        _close("sum over rows of B", B.sum(-1).reshape(bias.shape), wanted[1])


def _equal(name: str, got: list[int], expected: list[int]) -> None:
    if got != expected:
        raise AssertionError(f"{name}: expected {expected}, got {got}")


def _close(name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 1e3 * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(
        got, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}"
    )
