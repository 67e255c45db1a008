"""Triton kernels of the step, behind PyTorch operators: on CUDA they serve, elsewhere their twins.

The twins are :func:`singd.rounding.stochastic_round`, :func:`singd.descent.plain` and
:func:`singd.update.inner`. Randomness comes from a seed in a tensor and a count, so nothing waits
for the device. Deleting this folder leaves a correct library.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from singd.descent import plain
from singd.rounding import leading
from singd.rounding import stochastic_round as round_plainly

if importlib.util.find_spec("triton") is None:
    raise ImportError("the kernels need Triton")


@torch.library.custom_op("singd::stochastic_round", mutates_args=())
def stochastic_round(x: Tensor, dtype: torch.dtype, seed: Tensor, stream: int) -> Tensor:
    """``x`` in ``dtype``, bfloat16 or float16, rounded to one of its two neighbours.

    Args:
        x: Any shape, float32.
        dtype: Of the result.
        seed: One int64.
        stream: Tells uses of a seed apart.
    """
    return round_plainly(x, dtype, _generator(seed, stream))


@stochastic_round.register_kernel("cuda")
def _(x: Tensor, dtype: torch.dtype, seed: Tensor, stream: int) -> Tensor:
    from singd.kernels.rounding import round_sum

    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    round_sum(out, x, None, seed, stream)
    return out


@stochastic_round.register_fake
def _(x: Tensor, dtype: torch.dtype, seed: Tensor, stream: int) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@torch.library.custom_op("singd::add_rounded_", mutates_args=("stored",))
def add_rounded_(stored: Tensor, x: Tensor, alpha: Tensor, seed: Tensor, stream: int) -> None:
    """``stored <- stored + alpha x``, rounded stochastically.

    Args:
        stored: In bfloat16 or float16, contiguous.
        x: Like ``stored``, in float32.
        alpha: A scalar, or one number for each item of the first dimension.
        seed: One int64.
        stream: Tells uses of a seed apart.
    """
    moved = stored.float() + leading(alpha, stored) * x
    stored.copy_(round_plainly(moved, stored.dtype, _generator(seed, stream)))


@add_rounded_.register_kernel("cuda")
def _(stored: Tensor, x: Tensor, alpha: Tensor, seed: Tensor, stream: int) -> None:
    from singd.kernels.rounding import round_sum

    round_sum(stored, x, alpha, seed, stream)


@torch.library.custom_op("singd::descend_", mutates_args=("params", "buffers"))
def descend_(
    params: list[Tensor],
    directions: list[Tensor],
    buffers: list[Tensor],
    lr: float,
    momentum: float,
    weight_decay: float,
    seed: Tensor,
    stream: int,
    ok: Tensor | None = None,
) -> None:
    """Weight decay, momentum and the step for many parameters: :func:`singd.descent.plain`.

    Nothing changes if ``ok`` is there and says no.
    """
    if ok is not None and not bool(ok):
        return
    generator = _generator(seed, stream)

    def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
        return round_plainly(x, dtype, generator)

    plain(params, directions, buffers, lr, momentum, weight_decay, rounded)


@descend_.register_kernel("cuda")
def _(
    params: list[Tensor],
    directions: list[Tensor],
    buffers: list[Tensor],
    lr: float,
    momentum: float,
    weight_decay: float,
    seed: Tensor,
    stream: int,
    ok: Tensor | None = None,
) -> None:
    from singd.kernels.descent import launch

    launch(params, directions, buffers, lr, momentum, weight_decay, seed, stream, ok)


@torch.library.custom_op("singd::inner", mutates_args=())
def inner(x: Tensor, y: Tensor) -> Tensor:
    """Numbers ``[k]`` that add up to the inner product of two vectors, in float32.

    Args:
        x: Contiguous, in bfloat16 or float16.
        y: Like ``x``.
    """
    sums = torch.zeros(_programs(len(x)), dtype=torch.float32, device=x.device)
    sums[0] = torch.dot(x.float(), y.float())
    return sums


@inner.register_kernel("cuda")
def _(x: Tensor, y: Tensor) -> Tensor:
    from singd.kernels.inner_product import launch

    return launch(x, y, _programs(len(x)))


@inner.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    return torch.empty(_programs(len(x)), dtype=torch.float32, device=x.device)


def _programs(n: int) -> int:
    """How many programs share a sum of ``n`` products: a few of each multiprocessor at most."""
    return max(1, min(-(-n // 4096), 512))


def _generator(seed: Tensor, stream: int) -> torch.Generator:
    return torch.Generator(seed.device).manual_seed(int(seed) + stream)
