"""Sums of squares along rows, the diagonal of a Gram matrix.

Reference: ``torch.linalg.vecdot(X, X)``.

``X`` is read once, along whichever dimension is contiguous, and summed in float32. Where rows are
few and columns many, several programs share the columns; their sums are added afterwards in a fixed
order, so that results do not change from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from structured.kernels._layout import as_batch, parts


@triton.jit
def _kernel(
    X,
    out,
    n,
    m,
    batches,
    inner,
    stride_1,
    stride_2,
    stride_n,
    stride_m,
    part,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """``out[part, batch, row]`` for a block of rows of one matrix and a part of its columns."""
    blocks = tl.cdiv(n, BLOCK_N)
    program = tl.program_id(0)
    block, program = program % blocks, program // blocks
    batch, index = program % batches, program // batches
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    X += (batch // inner).to(tl.int64) * stride_1 + (batch % inner).to(tl.int64) * stride_2
    X += rows[:, None].to(tl.int64) * stride_n
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    start = index * part
    for first in range(start, tl.minimum(start + part, m), BLOCK_M):
        columns = first + tl.arange(0, BLOCK_M)
        mask = (rows[:, None] < n) & (columns[None, :] < m)
        x = tl.load(X + columns[None, :].to(tl.int64) * stride_m, mask=mask, other=0.0)
        x = x.to(tl.float32)
        total += x * x
    place = (index * batches + batch).to(tl.int64) * n + rows
    tl.store(out + place, tl.sum(total, 1).to(out.dtype.element_ty), mask=rows < n)


def launch(X: Tensor) -> Tensor:
    """``diag(X X^T)``, ``[..., n]``, for ``X [..., n, m]`` that is not empty."""
    shape, device = X.shape[:-1], X.device
    X, strides = as_batch(X)
    outer, inner, n, m = X.shape
    block_n, block_m = (128, 32) if strides[-2] == 1 else (4, 1024)
    programs = outer * inner * triton.cdiv(n, block_n)
    part = parts(m, programs, block_m, device, least=4)
    count = triton.cdiv(m, part)
    dtype = X.dtype if count == 1 else torch.float32
    out = torch.empty(count, *shape, dtype=dtype, device=device)
    _kernel[(count * programs,)](
        X, out, n, m, outer * inner, inner, *strides, part, BLOCK_N=block_n, BLOCK_M=block_m
    )
    return out[0] if count == 1 else out.sum(0).to(X.dtype)
