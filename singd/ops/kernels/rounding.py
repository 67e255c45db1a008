"""Stochastic rounding in one pass. Reference: :func:`singd.ops.reference.round_with_noise`.

The noise is that of :func:`singd.ops.reference.noise`, bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # numbers for each program
DROPPED = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}  # bits of float32
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9 - (1 << 64))
MIX_2 = tl.constexpr(0x94D049BB133111EB - (1 << 64))


@triton.jit
def mix(z):
    """The finalizer of SplitMix64 of int64 words."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * MIX_1
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * MIX_2
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


@triton.jit
def noise(key, i):
    """16 uniform random bits of the numbers ``i`` (int64) under ``key``."""
    word = mix((i >> 2) * GOLDEN + key)
    return ((word >> ((i & 3) * 16)) & 0xFFFF).to(tl.int32)


@triton.jit
def rounded(x, random, BITS: tl.constexpr):
    """``x`` (float32) with the lowest ``BITS`` bits of its mantissa rounded away by chance."""
    result = x
    if BITS > 0:
        bits = x.to(tl.int32, bitcast=True)
        finite = (bits & 0x7FFFFFFF) < 0x7F800000  # noise may carry a NaN into the sign
        up = (bits + (random >> (16 - BITS))) & ~((1 << BITS) - 1)
        result = tl.where(finite, up.to(tl.float32, bitcast=True), x)
    return result


@triton.jit
def _kernel(out, x, names, word, start, size, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """``out <- round(x)`` on one block of one row."""
    row = tl.program_id(1).to(tl.int64)
    key = mix(tl.load(names + row) + tl.load(word))
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    mask = i < size
    value = tl.load(x + row * size + i, mask=mask, other=0.0)
    value = rounded(value, noise(key, i + start), BITS)
    tl.store(out + row * size + i, value.to(out.dtype.element_ty), mask=mask)


def launch(x: Tensor, dtype: torch.dtype, names: Tensor, word: Tensor, start: int) -> Tensor:
    """``x [b, n]`` (float32) in ``dtype``; arguments as of the operator."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    rows, size = x.shape
    if out.numel():
        grid = (triton.cdiv(size, BLOCK), rows)
        bits = DROPPED[dtype]
        _kernel[grid](out, x.contiguous(), names, word, start, size, BLOCK=BLOCK, BITS=bits)
    return out
