"""Triton kernels of the step, behind PyTorch operators: on CUDA they serve, elsewhere references.

The references are in :mod:`singd.ops.reference`. Randomness is a hash of keys in tensors, so
nothing waits for the device. Deleting this folder leaves a correct library.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from singd.ops import reference

WHOLE = reference.Indices()

if importlib.util.find_spec("triton") is None:
    raise ImportError("the kernels need Triton")


@torch.library.custom_op("singd::stochastic_round", mutates_args=())
def stochastic_round(
    x: Tensor, dtype: torch.dtype, names: Tensor, word: Tensor, start: int
) -> Tensor:
    """``x`` in ``dtype``, rounded to one of its two neighbours.

    Args:
        x: Numbers ``[b, n]``, float32.
        dtype: bfloat16 or float16.
        names: Hash of the name of each row, int64 ``[b]``.
        word: Seed of the step, int64 ``[1]``.
        start: Index of the first number of a row.
    """
    return reference.round_with_noise(x, dtype, _noise(names, word, start, x.shape[1]))


@stochastic_round.register_kernel("cuda")
def _(x: Tensor, dtype: torch.dtype, names: Tensor, word: Tensor, start: int) -> Tensor:
    from singd.ops.kernels.rounding import launch

    return launch(x, dtype, names, word, start)


@stochastic_round.register_fake
def _(x: Tensor, dtype: torch.dtype, names: Tensor, word: Tensor, start: int) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


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
    ``boxes`` has the three numbers of :class:`~singd.ops.reference.Indices` for every parameter.
    """
    if unless is not None and bool(unless):
        return

    def rounded(x: Tensor, dtype: torch.dtype, index: int) -> Tensor:
        places = reference.Indices(*boxes[3 * index : 3 * index + 3]) if boxes else WHOLE
        keys = reference.mix_(names[index : index + 1] + word)
        noise = reference.noise_at(keys, places.of(torch.arange(x.numel(), device=x.device)))
        return reference.round_with_noise(x, dtype, noise.view(x.shape))

    numbers = lr, momentum, weight_decay, decoupled
    reference.momentum_step_(params, directions, buffers, *numbers, rounded)


@momentum_step_.register_kernel("cuda")
def _(
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
    from singd.ops.kernels.momentum_step import launch

    numbers = lr, momentum, weight_decay, decoupled
    launch(params, directions, buffers, *numbers, names, word, unless, boxes)


@torch.library.custom_op("singd::inner_product", mutates_args=())
def inner_product(x: Tensor, y: Tensor) -> Tensor:
    """Numbers ``[k]`` that add up to the inner product of two vectors, in float32.

    Args:
        x: Contiguous vector in bfloat16 or float16.
        y: Vector like ``x``.
    """
    sums = torch.zeros(_programs(len(x)), dtype=torch.float32, device=x.device)
    sums[0] = reference.inner_product(x, y)
    return sums


@inner_product.register_kernel("cuda")
def _(x: Tensor, y: Tensor) -> Tensor:
    from singd.ops.kernels.inner_products import launch

    return launch(x, y, _programs(len(x)))


@inner_product.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    return torch.empty(_programs(len(x)), dtype=torch.float32, device=x.device)


def _programs(n: int) -> int:
    """How many programs share a sum of ``n`` products: a few of each multiprocessor at most."""
    return max(1, min(-(-n // 4096), 512))


def _noise(names: Tensor, word: Tensor, start: int, count: int) -> Tensor:
    return reference.noise(reference.mix_(names + word), start, count)
