"""What each type of layer contributes: one table, :data:`LAYERS`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from singd._layer import Layer
from singd.attention import Attention
from singd.convolution import Convolution, TransposedConvolution


class Transposed(Layer):
    """Linear layers whose weight is ``[d_in, d_out]``."""

    def shape(self, module: Any) -> tuple[int, ...]:
        """``(d_out, d_in)``."""
        d_in, d_out = module.weight.shape
        return d_out, d_in

    def to_matrix(self, module: Any, weight: Tensor) -> Tensor:
        """``[d_out, d_in]``."""
        return weight.mT

    def from_matrix(self, module: Any, matrix: Tensor) -> Tensor:
        """``[d_in, d_out]``."""
        return matrix.mT


class Embedding(Transposed):
    """Embeddings: the input picks a row, so its factor is diagonal and counts how often."""

    input_structure = "diagonal"

    def inputs(self, module: Any, x: Tensor) -> Tensor:
        """One-hot rows, ``[N, P, d_in]``; the padding row is never picked."""
        hot = F.one_hot(self._picked(x), module.num_embeddings)
        if module.padding_idx is not None:
            hot[..., module.padding_idx] = 0
        return hot.to(module.weight.dtype)

    def square_sums(
        self, module: Any, x: Tensor, approximation: str, ones: bool
    ) -> tuple[Tensor, int]:
        """How often every row was picked."""
        counts = torch.bincount(x.flatten(), minlength=module.num_embeddings)
        if module.padding_idx is not None:
            counts[module.padding_idx] = 0
        return counts.to(torch.promote_types(module.weight.dtype, torch.float32)), x.numel()

    def inputs_along(self, module: Any, x: Tensor, u: Tensor) -> Tensor:
        """Rows of ``u``, without one-hot rows; the padding row has no gradient."""
        if module.padding_idx is not None:
            u = u.clone()
            u[module.padding_idx] = 0
        return u[self._picked(x)]

    def _picked(self, x: Tensor) -> Tensor:
        """The rows that are picked, ``[N, P]``."""
        N = x.shape[0] if x.ndim else 1
        return x.reshape(N, x.numel() // max(N, 1))


class Normalization(Layer):
    """Scale and shift of a normalization: for each of them a product of its own, ``[d, 1, 1]``."""

    def __init__(self, normalize: Callable[[Any, Tensor], Tensor], channels_last: bool) -> None:
        self.normalize, self.channels_last = normalize, channels_last

    def shape(self, module: Any) -> tuple[int, ...]:
        """``(d, 1, 1)``."""
        return module.weight.numel(), 1, 1

    def inputs(self, module: Any, x: Tensor) -> Tensor:
        """The normalized input, ``[d, N, P, 1]``."""
        return self._split(module, self.normalize(module, x))

    def grads(self, module: Any, g: Tensor) -> Tensor:
        """``[d, N, P, 1]``."""
        return self._split(module, g)

    def _split(self, module: Any, x: Tensor) -> Tensor:
        d = module.weight.numel()
        if self.channels_last:
            N = x.shape[0] if x.ndim > module.weight.ndim else 1
            rows = x.reshape(N, x.numel() // max(N * d, 1), d)
        else:
            rows = x.reshape(*x.shape[:2], torch.Size(x.shape[2:]).numel()).mT
        return rows.movedim(-1, 0)[..., None]


def _batch_norm(m: Any, x: Tensor) -> Tensor:
    batch_statistics = m.training or m.running_mean is None
    mean, var = (None, None) if batch_statistics else (m.running_mean, m.running_var)
    return F.batch_norm(x, mean, var, training=batch_statistics, eps=m.eps)


def _layer_norm(m: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, m.normalized_shape, eps=m.eps)


def _rms_norm(m: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, list(m.normalized_shape), eps=m.eps)


def _group_norm(m: Any, x: Tensor) -> Tensor:
    return F.group_norm(x, m.num_groups, eps=m.eps)


_BATCH_NORM = Normalization(_batch_norm, channels_last=False)

#: Types of layers that are preconditioned; subclasses are found through their base. ``None`` means
#: that AdamW trains them.
LAYERS: dict[type[nn.Module], Layer | None] = {
    nn.Linear: Layer(),
    nn.Conv1d: Convolution(),
    nn.Conv2d: Convolution(),
    nn.Conv3d: Convolution(),
    nn.ConvTranspose1d: TransposedConvolution(),
    nn.ConvTranspose2d: TransposedConvolution(),
    nn.ConvTranspose3d: TransposedConvolution(),
    nn.MultiheadAttention: Attention(),
}

#: Further types, preconditioned where ``SINGD(..., layers=...)`` names them.
OPTIONAL: dict[type[nn.Module], Layer] = {
    nn.Embedding: Embedding(),
    nn.LayerNorm: Normalization(_layer_norm, channels_last=True),
    nn.RMSNorm: Normalization(_rms_norm, channels_last=True),
    nn.GroupNorm: Normalization(_group_norm, channels_last=False),
    nn.BatchNorm1d: _BATCH_NORM,
    nn.BatchNorm2d: _BATCH_NORM,
    nn.BatchNorm3d: _BATCH_NORM,
}

#: Types of other packages, by name, so that they need not be imported.
FOREIGN: dict[str, Layer] = {
    "transformers.pytorch_utils.Conv1D": Transposed(),
    "torch_geometric.nn.dense.linear.Linear": Layer(),
}


def find_layer(module: nn.Module, optional: Collection[type[nn.Module]] = ()) -> Layer | None:
    """The entry of the tables for ``module``, or ``None``.

    Args:
        module: Any module.
        optional: The types of :data:`OPTIONAL` that count.
    """
    for cls in type(module).__mro__:
        if cls in LAYERS:
            return LAYERS[cls]
        if cls in OPTIONAL and cls in optional:
            return OPTIONAL[cls]
        name = f"{cls.__module__}.{cls.__qualname__}"
        if name in FOREIGN:
            return FOREIGN[name]
    return None


def find_products(module: nn.Module, optional: Collection[type[nn.Module]] = ()) -> Sequence[Layer]:
    """The matrix products that ``module`` consists of, with arguments as :func:`find_layer`."""
    layer = find_layer(module, optional)
    return () if layer is None else layer.products(module)


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
