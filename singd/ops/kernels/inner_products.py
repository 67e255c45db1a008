"""Inner products in 16 bits, summed in float32, in one pass.

Reference: :func:`singd.ops.reference.inner_product`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # places at a time


@triton.jit
def _kernel(x, y, sums, size, BLOCK: tl.constexpr):
    """The sum over every ``num_programs(0)``-th block."""
    total = tl.zeros((BLOCK,), tl.float32)
    places = tl.arange(0, BLOCK).to(tl.int64)
    for block in range(tl.program_id(0), tl.cdiv(size, BLOCK), tl.num_programs(0)):
        i = places + block * BLOCK
        mask = i < size
        a = tl.load(x + i, mask=mask, other=0.0).to(tl.float32)
        total += a * tl.load(y + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(sums + tl.program_id(0), tl.sum(total))


def launch(x: Tensor, y: Tensor, programs: int) -> Tensor:
    """The partial sum of each program, of the products of two vectors ``[n]``."""
    sums = torch.empty(programs, dtype=torch.float32, device=x.device)
    _kernel[(programs,)](x, y, sums, len(x), BLOCK=BLOCK)
    return sums
