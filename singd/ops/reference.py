"""Reference implementations in plain PyTorch of every operation that has a faster form.

The kernels of :mod:`singd.ops.kernels` and the fused paths of this package are tested against them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10}
"""Stored bits of the mantissa of the data types that are rounded stochastically."""

EXACT = (torch.float32, torch.float64)
"""Data types of parameters whose sums are rounded to nearest."""

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)

Rounded = Callable[[Tensor, torch.dtype, int], Tensor]
"""``(x, dtype, index)``: the ``index``-th tensor in a narrower data type."""


class Indices(NamedTuple):
    """Where the numbers of a box lie in a whole tensor: index of the ``k``-th in order.

    It is ``start + k // width * stride + k % width``: runs of ``width`` numbers, ``stride`` from
    one to the next. If both are equal there is one run.
    """

    start: int = 0
    width: int = 1
    stride: int = 1

    def of(self, k: Tensor) -> Tensor:
        """The indices of some numbers of the box."""
        if self.width == self.stride:
            return k + self.start
        return k // self.width * self.stride + k % self.width + self.start


def mix_(z: Tensor) -> Tensor:
    """The finalizer of SplitMix64 (Steele et al., OOPSLA 2014) of int64 words, in place."""
    z.bitwise_xor_((z >> 30) & ((1 << 34) - 1)).mul_(_MIX_1)
    z.bitwise_xor_((z >> 27) & ((1 << 37) - 1)).mul_(_MIX_2)
    return z.bitwise_xor_((z >> 31) & ((1 << 33) - 1))


def noise(keys: Tensor, start: int, count: int) -> Tensor:
    """Uniform integers in ``[0, 2^16)``, int32 ``[b, count]``, one row for each of ``keys [b]``.

    Number ``i`` of a row is the ``i % 4``-th quarter of a hash of its key and ``i // 4``, so rows
    may be computed in pieces.

    Args:
        keys: One int64 for each row.
        start: Index of the first number.
        count: How many numbers.
    """
    first, skip = divmod(start, 4)
    index = torch.arange(first, first - (-(skip + count) // 4), device=keys.device)
    words = mix_(index * _GOLDEN + keys[:, None])
    quarters = words.view(torch.int16)[:, skip : skip + count]
    return quarters.to(torch.int32).bitwise_and_(0xFFFF)


def noise_at(keys: Tensor, index: Tensor) -> Tensor:
    """The same numbers, those of indices ``[count]`` in any order."""
    words = mix_((index >> 2) * _GOLDEN + keys[:, None])
    return ((words >> ((index & 3) * 16)) & 0xFFFF).to(torch.int32)


def round_with_noise(x: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """``x`` in ``dtype``, up or down by 16 uniform random bits: unbiased stochastic rounding.

    The dropped bits of the mantissa are added to uniform noise of their range; a carry rounds up.

    Args:
        x: Numbers to round, float32, any shape.
        dtype: bfloat16, or float16 (below its normal range rounded to nearest).
        noise: Integers in ``[0, 2^16)``, int32, shaped like ``x``.
    """
    dropped = 23 - MANTISSA_BITS[dtype]
    special = (torch.nan, torch.inf, -torch.inf)  # any NaN as PyTorch's: noise cannot change a sign
    bits = torch.nan_to_num(x, *special).view(torch.int32)
    if dropped < 16:
        noise = noise >> (16 - dropped)
    return ((bits + noise) & (-1 << dropped)).view(torch.float32).to(dtype)


def momentum_step_(
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    buffers: Sequence[Tensor],
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    decoupled: bool,
    rounded: Rounded,
) -> None:
    """``b <- momentum b + d`` and ``p <- (1 - lr weight_decay) p - lr b``, in place.

    Args:
        params: Parameters ``p``; below float32 the sums run in float32.
        directions: Directions ``d``, like ``params``.
        buffers: Momenta ``b``, like ``params``; empty for no momentum.
        lr: Step size.
        momentum: Momentum in [0, 1).
        weight_decay: Weight decay.
        decoupled: Decay as above (AdamW's); otherwise ``weight_decay p`` is added to ``d``.
        rounded: Rounding of a new parameter below float32; momenta are rounded to nearest.
    """
    if not params:
        return
    exact = all(p.dtype in EXACT for p in params)
    wide = list(params) if exact else [p.float() for p in params]
    moves = [d.to(p.dtype) for p, d in zip(wide, directions, strict=True)]
    if weight_decay and decoupled and isinstance(lr, Tensor):
        torch._foreach_mul_(wide, (1.0 - lr * weight_decay).to(wide[0]))
    elif weight_decay and decoupled:
        torch._foreach_mul_(wide, 1.0 - lr * weight_decay)
    elif weight_decay:
        moves = list(torch._foreach_add(moves, wide, alpha=weight_decay))
    if buffers and exact:
        torch._foreach_mul_(list(buffers), momentum)
        torch._foreach_add_(list(buffers), moves)
        moves = list(buffers)
    elif buffers:
        sums = [b.float() for b in buffers]
        torch._foreach_mul_(sums, momentum)
        torch._foreach_add_(sums, moves)
        torch._foreach_copy_(list(buffers), sums)
        moves = sums
    if isinstance(lr, Tensor):
        torch._foreach_sub_(wide, torch._foreach_mul(moves, lr.to(wide[0])))
    else:
        torch._foreach_add_(wide, moves, alpha=-lr)
    if not exact:
        for index, (p, value) in enumerate(zip(params, wide, strict=True)):
            p.copy_(rounded(value, p.dtype, index))


def inner_product(x: Tensor, y: Tensor) -> Tensor:
    """``sum_i x_i y_i`` of two vectors, in float32 at least, a scalar."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.dot(x.to(wide), y.to(wide))
