"""Weight decay, momentum and the step of many parameters in one launch.

Twin: :func:`singd.descent.plain`. Every program works on one tensor, found in a table of
addresses. The table travels from pinned memory without a wait, and is kept while they stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from singd.kernels.rounding import DROPPED, rounded

BLOCK = 1024  # places for each of the four numbers of a call of Philox
PROGRAMS = 512  # for each tensor, at most
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

_CAPTURED: list[Tensor] = []  # what captured graphs will copy from

Row = tuple[int, int, int, int, int, int]  # three addresses, size, length and stride of rows


@triton.jit
def _one(
    param,
    direction,
    buffer,
    i,
    size,
    length,
    stride,
    noise,
    lr,
    momentum,
    weight_decay,
    MOMENTUM: tl.constexpr,
    STRIDED: tl.constexpr,
    BITS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    mask = i < size
    if WHOLE:  # known to the compiler: several places are read at once
        mask = tl.full(i.shape, 1, tl.int1)
    p = tl.load(param + i, mask=mask, other=0.0).to(tl.float32)
    place = i // length * stride + i % length if STRIDED else i
    d = tl.load(direction + place, mask=mask, other=0.0).to(tl.float32) + weight_decay * p
    if MOMENTUM:
        d += momentum * tl.load(buffer + i, mask=mask, other=0.0).to(tl.float32)
        tl.store(buffer + i, d.to(buffer.dtype.element_ty), mask=mask)
    moved = rounded(p - lr * d, noise, BITS)
    tl.store(param + i, moved.to(param.dtype.element_ty), mask=mask)


@triton.jit
def _kernel(
    table,
    seed,
    ok,
    stream,
    lr,
    momentum,
    weight_decay,
    TYPE: tl.constexpr,
    DIRECTION: tl.constexpr,
    MOMENTUM: tl.constexpr,
    GUARDED: tl.constexpr,
    STRIDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every ``num_programs(0)``-th block of one tensor."""
    tensor = tl.program_id(1)
    table += tensor * 6
    param = tl.load(table).to(tl.pointer_type(TYPE))
    direction = tl.load(table + 1).to(tl.pointer_type(DIRECTION))
    buffer = tl.load(table + 2).to(tl.pointer_type(TYPE))
    size, length, stride = tl.load(table + 3), tl.load(table + 4), tl.load(table + 5)
    if GUARDED:
        size = tl.where(tl.load(ok), size, 0)
    if ALIGNED:
        param, buffer = tl.multiple_of(param, 16), tl.multiple_of(buffer, 16)
        direction = tl.multiple_of(direction, 16)
    places = tl.arange(0, BLOCK).to(tl.int64)
    low = places.to(tl.uint32)
    zero = low * 0
    third, fourth = (zero + stream).to(tl.uint32), (zero + tensor).to(tl.uint32)
    start = tl.load(seed)
    for block in range(tl.program_id(0), tl.cdiv(size, 4 * BLOCK), tl.num_programs(0)):
        second = (zero + block).to(tl.uint32)
        noise = tl.philox(start, low, second, third, fourth)
        first = places + block * (4 * BLOCK)
        whole = (block + 1) * (4 * BLOCK) <= size
        for q in tl.static_range(4):
            i = first + q * BLOCK
            # fmt: off
            if whole:
                _one(param, direction, buffer, i, size, length, stride, noise[q], lr, momentum,
                     weight_decay, MOMENTUM, STRIDED, BITS, True)
            else:
                _one(param, direction, buffer, i, size, length, stride, noise[q], lr, momentum,
                     weight_decay, MOMENTUM, STRIDED, BITS, False)
            # fmt: on


def launch(
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    buffers: Sequence[Tensor],
    lr: float,
    momentum: float,
    weight_decay: float,
    seed: Tensor,
    stream: int,
    ok: Tensor | None = None,
) -> None:
    """One launch for each pair of dtypes and kind of memory; parameters are contiguous."""
    sorted_: dict[tuple[torch.dtype, torch.dtype, bool, bool], list[Row]] = {}
    kept = []
    for p, direction, b in zip(params, directions, buffers or params, strict=True):
        if not p.numel():
            continue
        d, length, stride = _in_rows(direction)
        kept.append(d)
        addresses = (p.data_ptr(), d.data_ptr(), b.data_ptr())
        aligned = all(address % 16 == 0 for address in addresses)
        kind = (p.dtype, d.dtype, stride != length, aligned)
        sorted_.setdefault(kind, []).append((*addresses, p.numel(), length, stride))
    for offset, ((dtype, other, strided, aligned), rows) in enumerate(sorted_.items()):
        blocks = triton.cdiv(max(row[3] for row in rows), 4 * BLOCK)
        _kernel[(min(blocks, PROGRAMS), len(rows))](
            _table(tuple(rows), params[0].device),
            seed,
            seed if ok is None else ok,
            stream + offset,
            lr,
            momentum,
            weight_decay,
            TYPE=TYPES[dtype],
            DIRECTION=TYPES[other],
            MOMENTUM=bool(buffers),
            GUARDED=ok is not None,
            STRIDED=strided,
            ALIGNED=aligned,
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
    return _kept_table(rows, device)[1]


@lru_cache(maxsize=64)
def _kept_table(rows: tuple[Row, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    host = torch.tensor(rows, dtype=torch.int64).pin_memory()
    return host, host.to(device, non_blocking=True)
