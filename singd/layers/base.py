"""A layer as a matrix product: the base class of every entry of :data:`singd.layers.LAYERS`.

For each of ``N`` samples and ``P`` shared positions, a vector of ``d_in`` inputs is multiplied by
the weight matrix ``[d_out, d_in]``. Leading dimensions ``...`` hold independent products side by
side (the groups of a convolution).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PIECE = 1 << 20  # bytes of patches or squares at a time: no copy of all activations is made


def piece_size(device: torch.device) -> int:
    """Bytes of patches at a time: as fit into the caches of a CPU; on a GPU, as outlast a launch.

    There a piece takes some ten launches, in which more than 16 MB could be read and multiplied.
    """
    return PIECE if device.type == "cpu" else 16 * PIECE


class Layer:
    """How to read a type of layer as a matrix product. Derive and register for your own.

    The default is right for a layer whose weight is ``[d_out, d_in]`` and which maps
    ``[N, ..., d_in]`` to ``[N, ..., d_out]``, such as :class:`torch.nn.Linear`.
    """

    weight = "weight"
    """The name of the parameter that is the weight."""

    bias = "bias"
    """The name of the parameter that is the bias, if there is one."""

    joins_bias = True
    """Whether the bias is one more column of the weight matrix, with constant input."""

    by_sample = True
    """Whether a few samples are read without the others."""

    input_structure: str | None = None
    """The structure of the input factor, where the inputs leave no choice."""

    def products(self, module: Any) -> Sequence[Layer]:
        """The layers that ``module`` consists of: this one, unless it is several."""
        return [self]

    def rows(self, module: Any) -> slice | None:
        """Rows of the weight (and of the bias) that this layer reads; all of them if ``None``."""
        return None

    def shape(self, module: Any) -> tuple[int, ...]:
        """``(..., d_out, d_in)``, without bias."""
        return tuple(getattr(module, self.weight).shape)

    def samples_first(self, module: Any, x: Tensor, samples: int | None) -> Tensor:
        """The input, or the output gradient, with the model's samples as the first dimension.

        The default finds them in ``[..., d]`` as the first or second dimension (sequence first), as
        groups of equally many rows (windows, flattened positions), or takes every row for one.

        Args:
            module: Module of the layer.
            x: Input or output gradient.
            samples: Number of samples that the model was called with; unknown if ``None``.
        """
        if samples is None or x.ndim < 2 or x.shape[0] == samples:
            return x
        if x.ndim > 2 and x.shape[1] == samples:
            return x.transpose(0, 1)
        rows = x.shape[:-1].numel()
        split = samples > 0 and rows > 0 and rows % samples == 0
        return x.reshape(samples, -1, x.shape[-1]) if split else x.flatten(0, -2)

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
        return matrix.reshape(getattr(module, self.weight).shape)

    def columns(self, module: Any, x: Tensor, approximation: str, ones: bool) -> tuple[Tensor, int]:
        """``A [..., d_in (+ 1), R]`` with ``A A^T`` the sum over the inputs, and their number R."""
        A = flatten_rows(self.inputs(module, x), approximation, average=True, ones=ones)
        return A, A.shape[-1]

    def square_sums(
        self, module: Any, x: Tensor, approximation: str, ones: bool
    ) -> tuple[Tensor, int]:
        """The diagonal ``[..., d_in (+ 1)]`` of that sum, in float32 at least, and R."""
        values = self.inputs(module, x)
        sums = square_sums(values, approximation, average=True)
        samples, positions = values.shape[-3:-1]
        rows = samples if approximation == "reduce" else samples * positions
        return (F.pad(sums, (0, 1), value=float(rows)) if ones else sums), rows

    def pieces(
        self, module: Any, x: Tensor, g: Tensor, size: int = PIECE
    ) -> Iterable[tuple[Tensor, Tensor]]:
        """Input and output gradient of a few samples at a time, where :meth:`inputs` is large.

        Args:
            module: Module of the layer.
            x: Input.
            g: Output gradient.
            size: Bytes of :meth:`inputs` that one piece should have.
        """
        return [(x, g)]

    def inputs_along(self, module: Any, x: Tensor, u: Tensor) -> Tensor:
        """:meth:`inputs` times directions ``u [d_in, k]``, ``[..., N, P, k]``."""
        return self.inputs(module, x).to(u) @ u

    def grads_along(self, module: Any, g: Tensor, v: Tensor) -> Tensor:
        """:meth:`grads` times directions ``v [d_out, k]``, ``[..., N, P, k]``."""
        return self.grads(module, g).to(v) @ v


class ParameterTensor(Layer):
    """A parameter of any module as it is, for methods that need gradients alone.

    Args:
        name: Name of the parameter in its module.
    """

    joins_bias = False

    def __init__(self, name: str) -> None:
        self.weight = name


def _positions(x: Tensor) -> Tensor:
    """``[N, ..., d]`` (or ``[d]``) as ``[N, P, d]``."""
    if x.ndim <= 2:
        return x[None, None] if x.ndim == 1 else x[:, None]
    return x.flatten(1, -2)


def flatten_rows(
    values: Tensor, approximation: str, *, average: bool, ones: bool = False
) -> Tensor:
    """``[..., N, P, d]`` as the columns ``[..., d (+ 1), R]`` of ``A`` or ``B``.

    KFAC-expand keeps every shared position as a row, KFAC-reduce averages inputs and sums gradients
    over them first (Eschenhagen et al., arXiv 2311.00636).

    Args:
        values: What :meth:`Layer.inputs` or :meth:`Layer.grads` returned.
        approximation: ``"expand"`` or ``"reduce"``.
        average: Under ``"reduce"``, average (inputs) or sum (gradients).
        ones: Append the constant input of a bias.
    """
    rows = _reduced(values, average) if approximation == "reduce" else values.flatten(-3, -2)
    return (F.pad(rows, (0, 1), value=1.0) if ones else rows).mT


def square_sums(values: Tensor, approximation: str, *, average: bool) -> Tensor:
    """Sums over rows of squares, ``[..., d]``, of what :func:`flatten_rows` makes of ``values``.

    In float32 at least; no more than :data:`PIECE` bytes at a time are squared, and none written
    down on a GPU, where that is one pass.
    """
    if approximation == "reduce":
        values = _reduced(values, average)[..., None, :]
    if not values.is_cpu:
        return _in_one_pass(values)
    wide = torch.promote_types(values.dtype, torch.float32)
    if values.numel() * wide.itemsize <= PIECE:
        return values.to(wide).square().sum((-3, -2))
    if values.ndim == 3 and values.is_contiguous():
        values = values.flatten(0, 1)[:, None]
    sample = values[..., :1, :, :].numel() * wide.itemsize
    first, *others = values.split(max(1, PIECE // max(1, sample)), -3)
    squares = first.to(wide).square()
    for other in others:  # one pass: sums stay where they are made
        piece = other.to(wide)
        squares.narrow(-3, 0, piece.shape[-3]).addcmul_(piece, piece)
    return squares.sum((-3, -2))


def _in_one_pass(values: Tensor) -> Tensor:
    """:func:`square_sums` of ``[..., N, P, d]`` by a kernel that squares what it reads."""
    wide = torch.promote_types(values.dtype, torch.float32)
    return torch.linalg.vector_norm(values, dim=(-3, -2), dtype=wide).square()


def _reduced(values: Tensor, average: bool) -> Tensor:
    return values.mean(-2) if average else values.sum(-2)
