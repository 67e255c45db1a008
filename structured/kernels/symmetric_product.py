"""Symmetric products ``X X^T`` by half their tiles. Reference: ``X @ X.mT``.

Only tiles on and below the diagonal are computed; each is stored twice. They are numbered down the
columns of bands of rows, so that programs that run side by side share what they read. Diagonal
blocks of a small size are one tile each: ``X`` is then read once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from structured._products.in_place import accumulate_
from structured.kernels._layout import as_batch, parts

BAND = 8  # rows of tiles


class Tiling(NamedTuple):
    """How the work is cut: tiles of ``size x size``, sums of ``depth`` columns at a time."""

    size: int
    depth: int
    warps: int
    stages: int


LARGE = Tiling(128, 64, 4, 3)  # where n > 64, in 16 bits


@triton.jit
def _row_of(place):
    """The row ``i`` of the ``place``-th number of a triangle: ``i (i + 1) / 2 <= place``."""
    i = ((tl.sqrt(8.0 * place.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i += ((i + 1) * (i + 2) // 2 <= place).to(tl.int32)  # float32 may be off by one
    return i - (i * (i + 1) // 2 > place).to(tl.int32)


@triton.jit
def _tile_of(place, tiles, BAND: tl.constexpr):
    """The ``place``-th tile ``(i, j)``, ``j <= i``: bands of rows, down their columns."""
    first = _row_of(place) // BAND * BAND
    height = tl.minimum(BAND, tiles - first)
    place -= first * (first + 1) // 2
    square = place < first * height
    corner = tl.where(square, 0, place - first * height)
    row = _row_of(corner)
    i = first + tl.where(square, place % height, row)
    j = tl.where(square, place // height, first + corner - row * (row + 1) // 2)
    return i, j


@triton.jit
def _kernel(
    X,
    out,
    n,
    m,
    batches,
    inner,
    x_1,
    x_2,
    x_n,
    x_m,
    out_0,
    out_1,
    out_2,
    out_n,
    out_m,
    part,
    alpha,
    beta,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of one matrix over a part of the columns, stored with its mirror image."""
    tiles = tl.cdiv(n, TILE)
    count = tiles * (tiles + 1) // 2
    program = tl.program_id(0)
    place, program = program % count, program // count
    batch, index = program % batches, program // batches
    i, j = _tile_of(place, tiles, BAND)
    rows, columns = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    X += (batch // inner).to(tl.int64) * x_1 + (batch % inner).to(tl.int64) * x_2
    left = X + rows[:, None].to(tl.int64) * x_n
    right = X + columns[:, None].to(tl.int64) * x_n
    total = tl.zeros((TILE, TILE), tl.float32)
    start = index * part
    for first in range(start, tl.minimum(start + part, m), DEPTH):
        k = first + tl.arange(0, DEPTH)
        shift = k[None, :].to(tl.int64) * x_m
        a = tl.load(left + shift, mask=(rows[:, None] < n) & (k[None, :] < m), other=0.0)
        b = tl.load(right + shift, mask=(columns[:, None] < n) & (k[None, :] < m), other=0.0)
        if WIDEN:  # Triton's interpreter has no products in 16 bits
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    out += (batch // inner).to(tl.int64) * out_1 + (batch % inner).to(tl.int64) * out_2
    out += index.to(tl.int64) * out_0
    inside = (rows[:, None] < n) & (columns[None, :] < n)
    below = out + rows[:, None].to(tl.int64) * out_n + columns[None, :].to(tl.int64) * out_m
    if ADD:
        total *= alpha
        if beta != 0.0:
            total += beta * tl.load(below, mask=inside, other=0.0).to(tl.float32)
    result = total.to(out.dtype.element_ty)
    tl.store(below, result, mask=inside)
    if i != j:
        above = out + columns[:, None].to(tl.int64) * out_n + rows[None, :].to(tl.int64) * out_m
        tl.store(above, tl.trans(result), mask=rows[None, :] < n)  # a tile to the left is whole


def tiling(n: int, dtype: torch.dtype) -> Tiling:
    """What is used for a size and a precision."""
    if n <= 64:
        size = max(16, triton.next_power_of_2(n))
        return Tiling(size, 128 if dtype.itemsize == 2 else 64, 4, 3)
    size, depth, warps, stages = LARGE
    return Tiling(size, depth if dtype.itemsize == 2 else depth // 2, warps, stages)


def launch(X: Tensor, cut: Tiling | None = None) -> Tensor:
    """``X X^T``, ``[..., n, n]``, for ``X [..., n, m]`` that is not empty."""
    out = torch.empty(*X.shape[:-1], X.shape[-2], dtype=X.dtype, device=X.device)
    _run(out, X, None, cut)
    return out


def launch_add(
    out: Tensor, X: Tensor, beta: float, alpha: float, cut: Tiling | None = None
) -> None:
    """``out <- beta out + alpha X X^T`` in place; ``out`` must be symmetric, of any strides."""
    _run(out, X, (beta, alpha), cut)


def _run(out: Tensor, X: Tensor, add: tuple[float, float] | None, cut: Tiling | None) -> None:
    beta, alpha = add or (0.0, 1.0)
    X, strides = as_batch(X)
    outer, inner, n, m = X.shape
    size, depth, warps, stages = cut or tiling(n, X.dtype)
    tiles = triton.cdiv(n, size)
    programs = outer * inner * tiles * (tiles + 1) // 2
    part = parts(m, programs, depth, X.device, least=16)
    count = triton.cdiv(m, part)
    if count == 1:
        target = out.view((*X.shape[:-1], n))[None]
    else:
        target = torch.empty(count, outer, inner, n, n, dtype=torch.float32, device=X.device)
    fast = torch.backends.cuda.matmul.fp32_precision == "tf32"
    _kernel[(count * programs,)](
        X,
        target,
        n,
        m,
        outer * inner,
        inner,
        *strides,
        *target.stride(),
        part,
        alpha,
        beta,
        TILE=size,
        DEPTH=depth,
        BAND=BAND,
        ADD=add is not None and count == 1,
        PRECISION="tf32" if fast else "ieee",
        WIDEN=X.device.type == "cpu",
        num_warps=warps,
        num_stages=stages,
    )
    if count > 1:
        accumulate_(out, target.sum(0).view(out.shape), beta=beta, alpha=alpha)
