"""What each type of layer contributes: one table, :data:`LAYERS`.

A layer is seen as a matrix product: for each of ``N`` samples and ``P`` shared positions, a vector
of ``d_in`` inputs is multiplied by the weight matrix ``[d_out, d_in]``. Leading dimensions ``...``
hold independent products side by side (the groups of a convolution).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Layer:
    """How to read a type of layer as a matrix product. Derive and register for your own.

    The default is right for a layer whose weight is ``[d_out, d_in]`` and which maps
    ``[N, ..., d_in]`` to ``[N, ..., d_out]``, such as :class:`torch.nn.Linear`.
    """

    def shape(self, module: Any) -> tuple[int, ...]:
        """``(..., d_out, d_in)``, without bias."""
        shape: tuple[int, ...] = tuple(module.weight.shape)
        return shape

    def inputs(self, module: Any, x: Tensor) -> Tensor:
        """The inputs of the product, ``[..., N, P, d_in]``, from the input of the layer."""
        return _positions(x)

    def grads(self, module: Any, g: Tensor) -> Tensor:
        """Gradients of the product, ``[..., N, P, d_out]``, from those of the layer's output."""
        return _positions(g)

    def to_matrix(self, module: Any, weight: Tensor) -> Tensor:
        """The weight, or its gradient, as ``[..., d_out, d_in]``."""
        return weight.reshape(self.shape(module))

    def from_matrix(self, module: Any, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`to_matrix`."""
        return matrix.reshape(module.weight.shape)


def _positions(x: Tensor) -> Tensor:
    """``[N, ..., d]`` (or ``[d]``) as ``[N, P, d]``."""
    return x.reshape(1, 1, -1) if x.ndim == 1 else x.reshape(x.shape[0], -1, x.shape[-1])


class Convolution(Layer):
    """Convolutions in one, two or three dimensions: every position sees one patch of the input."""

    def shape(self, module: Any) -> tuple[int, ...]:
        """``(d_out, d_in)``, or ``(groups, d_out / groups, d_in)``."""
        d_out, *rest = module.weight.shape
        d_in = torch.Size(rest).numel()
        groups = module.groups
        return (d_out, d_in) if groups == 1 else (groups, d_out // groups, d_in)

    def inputs(self, module: Any, x: Tensor) -> Tensor:
        """The patches, ``[(groups,) N, P, d_in]``."""
        kernel = module.kernel_size
        x = self._padded(module, x if x.ndim == len(kernel) + 2 else x[None])
        for d, (size, stride, dilation) in enumerate(
            zip(kernel, module.stride, module.dilation, strict=True)
        ):
            x = x.unfold(2 + d, dilation * (size - 1) + 1, stride)[..., ::dilation]
        # [N, channels, *positions, *kernel] -> [N, P, groups, channels / groups * kernel]
        N, _, *positions = x.shape[: 2 + len(kernel)]
        patches = x.movedim(1, 1 + len(kernel)).reshape(
            N, torch.Size(positions).numel(), module.groups, -1
        )
        return patches[:, :, 0] if module.groups == 1 else patches.movedim(2, 0)

    def grads(self, module: Any, g: Tensor) -> Tensor:
        """``[(groups,) N, P, d_out / groups]``."""
        g = g if g.ndim == len(module.kernel_size) + 2 else g[None]
        flat = g.reshape(g.shape[0], module.groups, g.shape[1] // module.groups, -1)
        return flat[:, 0].mT if module.groups == 1 else flat.movedim(1, 0).mT

    def _padded(self, module: Any, x: Tensor) -> Tensor:
        """``x`` with the padding that the layer adds, by number, ``"same"`` or ``"valid"``."""
        padding = module.padding
        if padding == "valid":
            return x
        if padding == "same":
            totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
            sides = [(total // 2, total - total // 2) for total in totals]
        else:
            sides = [(p, p) for p in padding]
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        flat = [side for pair in reversed(sides) for side in pair]
        return nn.functional.pad(x, flat, mode=mode)


#: Types of layers that are preconditioned. Subclasses are found through their base.
LAYERS: dict[type[nn.Module], Layer] = {
    nn.Linear: Layer(),
    nn.Conv1d: Convolution(),
    nn.Conv2d: Convolution(),
    nn.Conv3d: Convolution(),
}


def find_layer(module: nn.Module) -> Layer | None:
    """The entry of the table for ``module``, or ``None``."""
    for cls in type(module).__mro__:
        if cls in LAYERS:
            return LAYERS[cls]
    return None


def register_layer(module_type: type[nn.Module], layer: Layer) -> None:
    """Precondition modules of a type of your own.

    Args:
        module_type: A subclass of :class:`torch.nn.Module` with a parameter ``weight`` and
            optionally ``bias``, called with one tensor.
        layer: How to read it as a matrix product.

    Raises:
        TypeError: If the arguments are not of these types.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"register_layer: expected a type of nn.Module, got {module_type!r}")
    if not isinstance(layer, Layer):
        raise TypeError(f"register_layer: expected a Layer, got {type(layer).__name__}")
    LAYERS[module_type] = layer


def flatten_rows(
    values: Tensor, approximation: str, *, average: bool, ones: bool = False
) -> Tensor:
    """``[..., N, P, d]`` as the columns ``[..., d (+ 1), R]`` of ``A`` or ``B``.

    KFAC-expand keeps every shared position as a row, KFAC-reduce averages inputs and sums gradients
    over them first (Eschenhagen et al., arXiv 2311.00636).

    Args:
        values: From :meth:`Layer.inputs` or :meth:`Layer.grads`.
        approximation: ``"expand"`` or ``"reduce"``.
        average: Under ``"reduce"``, average (inputs) or sum (gradients).
        ones: Append the constant input of a bias.
    """
    if approximation == "reduce":
        rows = values.mean(-2) if average else values.sum(-2)
    else:
        rows = values.flatten(-3, -2)
    return (nn.functional.pad(rows, (0, 1), value=1.0) if ones else rows).mT
