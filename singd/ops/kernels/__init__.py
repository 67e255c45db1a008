"""Triton kernels of the step as PyTorch operators: on CUDA they serve, elsewhere references.

The references are in :mod:`singd.ops.reference`. :class:`structured.kernels.Guarded` checks every
kernel before it serves. Randomness is a hash of keys in tensors, so nothing waits for the device.
Deleting this folder leaves a correct library.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from singd.ops import reference
from structured.kernels import Guarded, KernelStatus, integers

DType = torch.dtype


def status() -> list[KernelStatus]:
    """Which kernels of this package serve, on which device and data types; those used so far."""
    return [row for kernel in GUARDED for row in kernel.status()]


# Stochastic rounding -----------------------------------------------------------------------------


@torch.library.custom_op("singd::stochastic_round", mutates_args=())
def stochastic_round(x: Tensor, dtype: DType, names: Tensor, word: Tensor, start: int) -> Tensor:
    """``x`` in ``dtype``, rounded to one of its two neighbours.

    Args:
        x: Numbers ``[b, n]``, float32.
        dtype: bfloat16 or float16.
        names: Hash of the name of each row, int64 ``[b]``.
        word: Seed of the step, int64 ``[1]``.
        start: Index of the first number of a row.
    """
    return GUARDED[0](x, dtype, names, word, start)


@stochastic_round.register_fake
def _(x: Tensor, dtype: DType, names: Tensor, word: Tensor, start: int) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _round(x: Tensor, dtype: DType, names: Tensor, word: Tensor, start: int) -> Tensor:
    from singd.ops.kernels.rounding import launch

    return launch(x, dtype, names, word, start)


def _round_plainly(x: Tensor, dtype: DType, names: Tensor, word: Tensor, start: int) -> Tensor:
    keys = reference.mix_(names + word)
    return reference.round_with_noise(x, dtype, reference.noise(keys, start, x.shape[1]))


def _rounded_samples(device: torch.device, dtypes: Sequence[DType]) -> Iterator[tuple[Any, ...]]:
    """Numbers between those of 16 bits: the noise decides, and is the same bit by bit."""
    x = integers(3, 700, bound=500, dtype=torch.float32, device=device) / 7
    yield x, dtypes[-1], *_keys(3, device), 5


# The step of the parameters ----------------------------------------------------------------------


@torch.library.custom_op("singd::momentum_step_", mutates_args=("params", "buffers"))
def momentum_step_(
    params: list[Tensor],
    directions: list[Tensor],
    buffers: list[Tensor],
    lr: float,
    momentum: float,
    weight_decay: float,
    decoupled: bool,
    names: Tensor,
    word: Tensor,
    unless: Tensor | None = None,
    boxes: list[int] | None = None,
) -> None:
    """Weight decay, momentum and the step of many parameters.

    Reference: :func:`singd.ops.reference.momentum_step_`. Nothing changes if ``unless`` is true.
    Tensors of one kind are moved together: of the same data types and layout. ``boxes`` has the
    three numbers of :class:`~singd.ops.reference.Indices` for every parameter.
    """
    kinds: dict[Any, list[int]] = {}
    for i, (p, d) in enumerate(zip(params, directions, strict=True)):
        if p.numel():
            # Rows of a larger matrix, or addresses that are not aligned, are slower to read.
            aligned = all(t.data_ptr() % 16 == 0 for t in (p, d, *buffers[i : i + 1]))
            is_box = boxes is not None and boxes[3 * i + 1] != boxes[3 * i + 2]
            kind = p.dtype, d.dtype, d.is_contiguous(), aligned, is_box
            kinds.setdefault(kind, []).append(i)
    for places in kinds.values():
        moved = (
            [each[i] for i in places] if each else [] for each in (params, directions, buffers)
        )
        numbers = lr, momentum, weight_decay, decoupled
        GUARDED[1](*moved, places, *numbers, names, word, unless, boxes)


def _step_(*args: Any) -> None:
    from singd.ops.kernels.momentum_step import launch

    launch(*args)


def _step_plainly_(
    params: list[Tensor],
    directions: list[Tensor],
    buffers: list[Tensor],
    places: list[int],
    lr: float,
    momentum: float,
    weight_decay: float,
    decoupled: bool,
    names: Tensor,
    word: Tensor,
    unless: Tensor | None,
    boxes: list[int] | None,
) -> None:
    def rounded(x: Tensor, dtype: DType, index: int) -> Tensor:
        place = places[index]
        indices = reference.Indices(*boxes[3 * place : 3 * place + 3] if boxes else ())
        at = indices.of(torch.arange(x.numel(), device=x.device))
        noise = reference.noise_at(reference.mix_(names[place : place + 1] + word), at)
        return reference.round_with_noise(x, dtype, noise.view(x.shape))

    numbers = lr, momentum, weight_decay, decoupled
    before = [] if unless is None else [t.clone() for t in (*params, *buffers)]
    reference.momentum_step_(params, directions, buffers, *numbers, rounded)
    if unless is not None:
        for t, old in zip((*params, *buffers), before, strict=True):
            torch.where(unless, old, t, out=t)


def _step_samples(device: torch.device, dtypes: Sequence[DType]) -> Iterator[tuple[Any, ...]]:
    """Sums that are exact in float32 and round in 16 bits, with and without each variant."""
    for strided, unless in ((False, None), (True, False), (True, True)):
        p, d, b = [], [], []
        for n in (7, 150):
            p.append(4 * integers(n, 9, bound=50, dtype=dtypes[0], device=device))
            along = integers(n, 9 + strided, bound=3, dtype=dtypes[-1], device=device)
            d.append(along[:, :9])
            if strided:
                b.append(2 * integers(n, 9, bound=3, dtype=dtypes[0], device=device))
        boxes = [0, 1, 1, 3, 40, 70, 5, 9, 11] if strided else None
        guard = None if unless is None else torch.full((), unless, device=device)
        numbers = 2.0**-5, 0.5 * strided, 0.25, strided
        yield p, d, b, [2, 1], *numbers, *_keys(3, device), guard, boxes


# Inner products ----------------------------------------------------------------------------------


@torch.library.custom_op("singd::inner_product", mutates_args=())
def inner_product(x: Tensor, y: Tensor) -> Tensor:
    """Numbers ``[k]`` that add up to the inner product of two vectors, in float32.

    Args:
        x: Contiguous vector in bfloat16 or float16.
        y: Vector like ``x``.
    """
    return GUARDED[2](x, y, _programs(len(x)))


@inner_product.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    return torch.empty(_programs(len(x)), dtype=torch.float32, device=x.device)


def _programs(n: int) -> int:
    """How many programs share a sum of ``n`` products: a few of each multiprocessor at most."""
    return max(1, min(-(-n // 4096), 512))


def _multiply(x: Tensor, y: Tensor, programs: int) -> Tensor:
    from singd.ops.kernels.inner_products import launch

    return launch(x, y, programs)


def _multiply_plainly(x: Tensor, y: Tensor, programs: int) -> Tensor:
    sums = torch.zeros(programs, dtype=torch.float32, device=x.device)
    sums[0] = reference.inner_product(x, y)
    return sums


def _inner_samples(device: torch.device, dtypes: Sequence[DType]) -> Iterator[tuple[Any, ...]]:
    x = integers(9000, bound=5, dtype=dtypes[0], device=device)
    yield x, x.flip(0), 1


# The check of the kernels ------------------------------------------------------------------------


def _keys(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Names and the seed of a step, as good as random."""
    words = reference.mix_(torch.arange(count + 1, device=device))
    return words[1:], words[:1]


GUARDED = (
    Guarded("singd::stochastic_round", _round, _round_plainly, _rounded_samples),
    Guarded("singd::momentum_step_", _step_, _step_plainly_, _step_samples),
    Guarded("singd::inner_product", _multiply, _multiply_plainly, _inner_samples),
)
