"""Stochastic rounding in one pass. Twin: :func:`singd.rounding.stochastic_round`.

The noise is Philox's (Salmon et al., SC 2011), a function of seed, stream and place: four numbers
from each call serve four places.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # places for each of the four numbers of a call of Philox
DROPPED = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}  # bits of float32


@triton.jit
def rounded(x, noise, BITS: tl.constexpr):
    """``x`` (float32) with the lowest ``BITS`` bits of its mantissa rounded away by chance."""
    result = x
    if BITS > 0:
        bits = x.to(tl.int32, bitcast=True)
        finite = (bits & 0x7FFFFFFF) < 0x7F800000  # noise may carry a NaN into the sign
        dropped = (1 << BITS) - 1
        up = (bits + (noise.to(tl.int32, bitcast=True) & dropped)) & ~dropped
        result = tl.where(finite, up.to(tl.float32, bitcast=True), x)
    return result


@triton.jit
def _one(out, x, scale, i, size, noise, BITS: tl.constexpr, ADD: tl.constexpr):
    mask = i < size
    value = tl.load(x + i, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        value = tl.load(out + i, mask=mask, other=0.0).to(tl.float32) + scale * value
    tl.store(out + i, rounded(value, noise, BITS).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _kernel(
    out,
    x,
    alpha,
    seed,
    stream,
    size,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    ADD: tl.constexpr,
):
    """``out <- round(x)`` or ``round(out + alpha x)`` on four neighbouring blocks of an item."""
    program, item = tl.program_id(0), tl.program_id(1)
    places = tl.arange(0, BLOCK)
    low = places.to(tl.uint32)
    zero = low * 0
    second, third = (zero + program).to(tl.uint32), (zero + stream).to(tl.uint32)
    numbers = tl.philox(tl.load(seed), low, second, third, (zero + item).to(tl.uint32))
    scale = 1.0
    if ADD:
        scale = tl.load(alpha + item).to(tl.float32)
    out += item.to(tl.int64) * size
    x += item.to(tl.int64) * size
    first = program.to(tl.int64) * (4 * BLOCK) + places
    for q in tl.static_range(4):
        _one(out, x, scale, first + q * BLOCK, size, numbers[q], BITS, ADD)


def round_sum(out: Tensor, x: Tensor, alpha: Tensor | None, seed: Tensor, stream: int) -> None:
    """``out <- round(x)``, or ``out <- round(out + alpha x)`` where ``alpha`` is given.

    Args:
        out: Contiguous.
        x: Like ``out``, in float32.
        alpha: A scalar, or one number for each item of the first dimension.
        seed: One int64.
        stream: Tells uses of a seed apart.
    """
    if not out.numel():
        return
    items = 1 if alpha is None else alpha.numel()
    size = out.numel() // items
    _kernel[(triton.cdiv(size, 4 * BLOCK), items)](
        out,
        x.contiguous(),
        x if alpha is None else alpha.contiguous(),
        seed,
        stream,
        size,
        BLOCK=BLOCK,
        BITS=DROPPED[out.dtype],
        ADD=alpha is not None,
    )
