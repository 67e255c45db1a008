"""Convolutions as matrix products: every position sees one patch of the input."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from singd.layers.base import PIECE, Layer, square_sums

_CORRELATE = (F.conv1d, F.conv2d, F.conv3d)  # by the number of dimensions, from one on


class Convolution(Layer):
    """Convolutions in one, two or three dimensions: every position sees one patch of the input."""

    def shape(self, module: Any) -> tuple[int, ...]:
        """``(d_out, d_in)``, or ``(groups, d_out / groups, d_in)``."""
        d_out, *rest = module.weight.shape
        d_in = torch.Size(rest).numel()
        groups = module.groups
        return (d_out, d_in) if groups == 1 else (groups, d_out // groups, d_in)

    def samples_first(self, module: Any, x: Tensor, samples: int | None) -> Tensor:
        """Samples come first in every convolution."""
        return x

    def inputs(self, module: Any, x: Tensor) -> Tensor:
        """The patches, ``[(groups,) N, P, d_in]``."""
        return self._patches(module, self._padded(module, _batched(module, x))).movedim(-3, -1)

    def columns(self, module: Any, x: Tensor, approximation: str, ones: bool) -> tuple[Tensor, int]:
        """As :meth:`Layer.columns`; patches are written where they are needed, once."""
        if approximation != "expand":
            return super().columns(module, x, approximation, ones)
        x = self._padded(module, _batched(module, x))
        A = self._patches(module, x, ones).flatten(-2)
        return A, A.shape[-1]

    def pieces(
        self, module: Any, x: Tensor, g: Tensor, size: int = PIECE
    ) -> Iterable[tuple[Tensor, Tensor]]:
        """As many samples at a time as have ``size`` bytes of patches."""
        if x.ndim != len(module.kernel_size) + 2:
            return [(x, g)]
        seen, positions = self._patched(x, g)
        places = seen.shape[1] * torch.Size(module.kernel_size).numel()
        patches = places * positions.shape[2:].numel()
        largest = max(patches, x[:1].numel(), g[:1].numel())
        count = max(1, size // max(1, largest * x.element_size()))
        return zip(x.split(count), g.split(count), strict=True)

    def _patched(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Of input and output gradient: whose patches are seen, and whose positions see them."""
        return x, g

    def _patches(self, module: Any, x: Tensor, ones: bool = False) -> Tensor:
        """``[(groups,) d_in (+ 1), N, P]``: a place of the kernel sees whole rows of positions."""
        kernel, groups = module.kernel_size, module.groups
        for d, (size, stride, dilation) in enumerate(
            zip(kernel, module.stride, module.dilation, strict=True)
        ):
            x = x.unfold(2 + d, dilation * (size - 1) + 1, stride)[..., ::dilation]
        x = x.unflatten(1, (groups, x.shape[1] // groups))
        # [N, groups, channels, *positions, *kernel] -> [groups, channels, *kernel, N, *positions]
        first = 3 + len(kernel)
        x = x.permute(1, 2, *range(first, x.ndim), 0, *range(3, first))
        places, positions = x.shape[1 : first - 1], x.shape[first:]
        d_in = places.numel()
        patches = x.new_empty(groups, d_in + ones, x.shape[first - 1], positions.numel())
        patches[:, :d_in].unflatten(1, places).unflatten(-1, positions).copy_(x)
        if ones:
            patches[:, d_in].fill_(1.0)
        return patches[0] if groups == 1 else patches

    def square_sums(
        self, module: Any, x: Tensor, approximation: str, ones: bool
    ) -> tuple[Tensor, int]:
        """Without patches: a square is seen from every position that the kernel reaches it from.

        That is a correlation of ``x^2`` with a grid of ones as large as the output, stride and
        dilation exchanged.
        """
        if approximation != "expand":
            return super().square_sums(module, x, approximation, ones)
        x = _batched(module, x)
        samples = x.movedim(0, -2)[..., None, :]  # [channels, ..., N, 1, size]
        squares = square_sums(samples, "expand", average=True)
        squares = self._padded(module, squares[None])[0]
        geometry = zip(
            squares.shape[1:], module.kernel_size, module.stride, module.dilation, strict=True
        )
        positions, reached = [], []
        for size, kernel, stride, dilation in geometry:
            positions.append((size - dilation * (kernel - 1) - 1) // stride + 1)
            reached.append((positions[-1] - 1) * stride + dilation * (kernel - 1) + 1)
        squares = squares[(slice(None), *(slice(r) for r in reached))]
        correlate = _CORRELATE[len(positions) - 1]
        grid = squares.new_ones((1, 1, *positions))
        sums = correlate(squares[:, None], grid, stride=module.dilation, dilation=module.stride)
        sums = sums.reshape(module.groups, -1) if module.groups > 1 else sums.flatten()
        rows = x.shape[0] * torch.Size(positions).numel()
        return (F.pad(sums, (0, 1), value=float(rows)) if ones else sums), rows

    def grads(self, module: Any, g: Tensor) -> Tensor:
        """``[(groups,) N, P, d_out / groups]``."""
        return self._channels(module, _batched(module, g))

    def inputs_along(self, module: Any, x: Tensor, u: Tensor) -> Tensor:
        """A convolution with ``u`` for the kernel: no patches."""
        return self._correlated(module, self._padded(module, _batched(module, x)), u)

    def _correlated(self, module: Any, x: Tensor, u: Tensor) -> Tensor:
        """The patches of ``x``, padded already, times ``u [d, k]``: ``[(groups,) N, P, k]``."""
        groups, k = module.groups, u.shape[-1]
        kernel = u.mT.reshape(k, -1, *module.kernel_size)
        along = _CORRELATE[len(module.kernel_size) - 1](
            x.to(u),
            kernel.repeat(groups, *[1] * (kernel.ndim - 1)),
            stride=module.stride,
            dilation=module.dilation,
            groups=groups,
        )
        return self._channels(module, along)

    def _channels(self, module: Any, g: Tensor) -> Tensor:
        flat = g.flatten(2).unflatten(1, (module.groups, g.shape[1] // module.groups))
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
        return F.pad(x, flat, mode=mode)


class TransposedConvolution(Convolution):
    """Transposed convolutions: a convolution with inputs and output gradients exchanged.

    Every position of the input is multiplied onto one patch of the output, so ``d_out`` counts the
    places of a patch. A bias is seen by places, not patches, and is no column of that matrix.
    """

    joins_bias = False
    columns, square_sums = Layer.columns, Layer.square_sums  # its inputs are no patches
    inputs_along = Layer.inputs_along

    def shape(self, module: Any) -> tuple[int, ...]:
        """``(d_out, d_in)``, or ``(groups, d_out, d_in / groups)``."""
        d_in, *rest = module.weight.shape
        d_out, groups = torch.Size(rest).numel(), module.groups
        return (d_out, d_in) if groups == 1 else (groups, d_out, d_in // groups)

    def inputs(self, module: Any, x: Tensor) -> Tensor:
        """``[(groups,) N, P, d_in / groups]``."""
        return self._channels(module, _batched(module, x))

    def grads(self, module: Any, g: Tensor) -> Tensor:
        """The patches of the output, ``[(groups,) N, P, d_out]``."""
        return self._patches(module, self._reached(module, g)).movedim(-3, -1)

    def grads_along(self, module: Any, g: Tensor, v: Tensor) -> Tensor:
        """A convolution with ``v`` for the kernel: no patches."""
        return self._correlated(module, self._reached(module, g), v)

    def _reached(self, module: Any, g: Tensor) -> Tensor:
        """What patches of the output reach, with its padding."""
        g = self._padded(module, _batched(module, g))
        for d, (size, stride, dilation, extra) in enumerate(
            zip(
                module.kernel_size,
                module.stride,
                module.dilation,
                module.output_padding,
                strict=True,
            )
        ):
            positions = (g.shape[2 + d] - extra - dilation * (size - 1) - 1) // stride + 1
            g = g.narrow(2 + d, 0, (positions - 1) * stride + dilation * (size - 1) + 1)
        return g

    def _patched(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return g, x

    def to_matrix(self, module: Any, weight: Tensor) -> Tensor:
        """``[(groups,) d_out, d_in / groups]``."""
        *groups, d_out, d_in = self.shape(module)
        return weight.reshape(*groups, d_in, d_out).mT

    def from_matrix(self, module: Any, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`to_matrix`."""
        return matrix.mT.reshape(module.weight.shape)


def _batched(module: Any, x: Tensor) -> Tensor:
    """``x`` with the batch dimension that a convolution's input may lack."""
    return x if x.ndim == len(module.kernel_size) + 2 else x[None]
