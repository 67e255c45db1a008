"""What each type of layer contributes: one table, :data:`LAYERS`."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from singd.layers.attention import Attention
from singd.layers.base import Layer
from singd.layers.convolution import Convolution, TransposedConvolution
from singd.layers.embedding import Embedding
from singd.layers.linear import Transposed
from singd.layers.normalization import BATCH_NORM, GROUP_NORM, LAYER_NORM, RMS_NORM

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
    nn.LayerNorm: LAYER_NORM,
    nn.RMSNorm: RMS_NORM,
    nn.GroupNorm: GROUP_NORM,
    nn.BatchNorm1d: BATCH_NORM,
    nn.BatchNorm2d: BATCH_NORM,
    nn.BatchNorm3d: BATCH_NORM,
}

#: Types of other packages, by name, so that they need not be imported.
OF_OTHER_PACKAGES: dict[str, Layer] = {
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
        if name in OF_OTHER_PACKAGES:
            return OF_OTHER_PACKAGES[name]
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
