"""Weight decay, momentum and the step of many parameters in one launch.

Reference: :func:`singd.ops.reference.momentum_step_`. Every program works on one tensor, found in a
table of addresses. The table travels from pinned memory without a wait, and is cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from singd.ops.kernels.rounding import DROPPED, mix, noise, rounded

BLOCK = 1024  # numbers at a time
PROGRAMS = 512  # for each tensor, at most
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

_CAPTURED: list[Tensor] = []  # host memory that captured graphs copy from

Row = tuple[int, int, int, int, int, int, int, int, int, int]
"""Three addresses; size, length and stride of the rows of the direction; index of the name; start,
width and stride of the indices of the numbers within the tensor of that name."""


@triton.jit
def _one(
    param,
    direction,
    buffer,
    i,
    size,
    length,
    stride,
    key,
    start,
    width,
    step,
    lr,
    momentum,
    weight_decay,
    DECOUPLED: tl.constexpr,
    MOMENTUM: tl.constexpr,
    STRIDED: tl.constexpr,
    BOXES: tl.constexpr,
    BITS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    mask = i < size
    if WHOLE:  # known to the compiler: several places are read at once
        mask = tl.full(i.shape, 1, tl.int1)
    p = tl.load(param + i, mask=mask, other=0.0).to(tl.float32)
    place = i // length * stride + i % length if STRIDED else i
    d = tl.load(direction + place, mask=mask, other=0.0).to(tl.float32)
    if DECOUPLED:
        p -= lr * weight_decay * p
    else:
        d += weight_decay * p
    if MOMENTUM:
        d += momentum * tl.load(buffer + i, mask=mask, other=0.0).to(tl.float32)
        tl.store(buffer + i, d.to(buffer.dtype.element_ty), mask=mask)
    index = start + i // width * step + i % width if BOXES else start + i
    moved = rounded(p - lr * d, noise(key, index), BITS)
    tl.store(param + i, moved.to(param.dtype.element_ty), mask=mask)


@triton.jit
def _kernel(
    table,
    names,
    word,
    unless,
    lr,
    momentum,
    weight_decay,
    TYPE: tl.constexpr,
    DIRECTION: tl.constexpr,
    DECOUPLED: tl.constexpr,
    MOMENTUM: tl.constexpr,
    GUARDED: tl.constexpr,
    STRIDED: tl.constexpr,
    BOXES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every ``num_programs(0)``-th block of one tensor."""
    table += tl.program_id(1) * 10
    param = tl.load(table).to(tl.pointer_type(TYPE))
    direction = tl.load(table + 1).to(tl.pointer_type(DIRECTION))
    buffer = tl.load(table + 2).to(tl.pointer_type(TYPE))
    size, length, stride = tl.load(table + 3), tl.load(table + 4), tl.load(table + 5)
    key = mix(tl.load(names + tl.load(table + 6)) + tl.load(word))
    start, width, step = tl.load(table + 7), tl.load(table + 8), tl.load(table + 9)
    if GUARDED:
        size = tl.where(tl.load(unless), 0, size)
    if ALIGNED:
        param, buffer = tl.multiple_of(param, 16), tl.multiple_of(buffer, 16)
        direction = tl.multiple_of(direction, 16)
    places = tl.arange(0, BLOCK).to(tl.int64)
    for block in range(tl.program_id(0), tl.cdiv(size, BLOCK), tl.num_programs(0)):
        i = places + block * BLOCK
        whole = (block + 1) * BLOCK <= size
        # fmt: off
        if whole:
            _one(param, direction, buffer, i, size, length, stride, key, start, width, step, lr,
                 momentum, weight_decay, DECOUPLED, MOMENTUM, STRIDED, BOXES, BITS, True)
        else:
            _one(param, direction, buffer, i, size, length, stride, key, start, width, step, lr,
                 momentum, weight_decay, DECOUPLED, MOMENTUM, STRIDED, BOXES, BITS, False)
        # fmt: on


def launch(
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    buffers: Sequence[Tensor],
    places: Sequence[int],
    lr: float,
    momentum: float,
    weight_decay: float,
    decoupled: bool,
    names: Tensor,
    word: Tensor,
    unless: Tensor | None = None,
    boxes: Sequence[int] | None = None,
) -> None:
    """One launch, for tensors that are alike in data types and layout and are not empty.

    Arguments are those of the operator, and the place in ``names`` of each parameter. Parameters
    and momenta are contiguous; directions may be columns of a wider matrix.
    """
    rows: list[Row] = []
    alive = []  # copies of directions, until the kernel is launched
    for p, direction, b, place in zip(params, directions, buffers or params, places, strict=True):
        d, length, stride = _in_rows(direction)
        alive.append(d)
        addresses = p.data_ptr(), d.data_ptr(), b.data_ptr()
        start, width, step = boxes[3 * place : 3 * place + 3] if boxes else (0, 1, 1)
        rows.append((*addresses, p.numel(), length, stride, place, start, width, step))
    dtype = params[0].dtype
    blocks = triton.cdiv(max(row[3] for row in rows), BLOCK)
    _kernel[(min(blocks, PROGRAMS), len(rows))](
        _table(tuple(rows), params[0].device),
        names,
        word,
        word if unless is None else unless,
        lr,
        momentum,
        weight_decay,
        TYPE=TYPES[dtype],
        DIRECTION=TYPES[alive[0].dtype],
        DECOUPLED=decoupled,
        MOMENTUM=bool(buffers),
        GUARDED=unless is not None,
        STRIDED=any(row[5] != row[4] for row in rows),
        BOXES=any(row[8] != row[9] for row in rows),
        ALIGNED=all(address % 16 == 0 for row in rows for address in row[:3]),
        BITS=DROPPED[dtype],
        BLOCK=BLOCK,
    )


def _in_rows(d: Tensor) -> tuple[Tensor, int, int]:
    """A direction as contiguous rows: itself or a copy, their length, and from each to the next."""
    if d.is_contiguous():
        return d, d.numel(), d.numel()
    if d[0].is_contiguous():
        return d, d[0].numel(), d.stride(0)
    return d.contiguous(), d.numel(), d.numel()


def _table(rows: tuple[Row, ...], device: torch.device) -> Tensor:
    """The rows on the device."""
    if device.type == "cpu":  # Triton's interpreter
        return torch.tensor(rows, dtype=torch.int64)
    if torch.cuda.is_current_stream_capturing():
        host = torch.tensor(rows, dtype=torch.int64).pin_memory()
        _CAPTURED.append(host)
        return host.to(device, non_blocking=True)
    return _cached_table(rows, device)[1]


@lru_cache(maxsize=64)
def _cached_table(rows: tuple[Row, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    host = torch.tensor(rows, dtype=torch.int64).pin_memory()
    return host, host.to(device, non_blocking=True)
