"""The step of the parameters: weight decay, momentum, and a sum that is never rounded to nearest.

One kernel does it for many parameters: ours on a GPU, on the CPU that of :class:`torch.optim.SGD`,
below float32 on wide copies piece by piece; elsewhere PyTorch's ``foreach`` operations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from singd.rounding import Rounding, kernels

_EXACT = (torch.float32, torch.float64)
PIECE = 1 << 17  # numbers at a time, in the processor's caches


def descend(
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    buffers: Sequence[Tensor],
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    rounding: Rounding,
    scale: Tensor | None = None,
    ok: Tensor | None = None,
) -> None:
    """``b <- momentum b + s d + weight_decay p`` and ``p <- p - lr b``, in place.

    Below float32 the sums run in float32, ``p`` is rounded stochastically and ``b`` to nearest.

    Args:
        params: The parameters ``p``, all on one device.
        directions: What they move along, ``d``; of no use afterwards if there is a ``scale``.
        buffers: Their momenta ``b``, like ``params``; empty for no momentum.
        lr: Of the step; a tensor, which a CUDA graph reads anew, costs one more pass.
        momentum: In [0, 1).
        weight_decay: Not negative.
        rounding: Of this step.
        scale: Of the directions, ``s``; 1 if ``None``.
        ok: A truth value on the device of ``params``: if it says no, nothing changes.
    """
    if not params:
        return
    ordered = _are_in_order(params, buffers)
    fast = None if ordered or isinstance(lr, Tensor) else _kernels(params, directions, buffers)
    if ok is not None and fast is None:
        places = [*params, *buffers]
        before = [place.clone() for place in places]
        options: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        descend(params, directions, buffers, **options, rounding=rounding, scale=scale)
        for place, old in zip(places, before, strict=True):
            torch.where(ok, place, old, out=place)
        return
    if scale is not None and not (ordered and params[0].dtype != torch.float64):
        directions = list(directions)
        torch._foreach_mul_(directions, scale.to(directions[0]))
        scale = None
    if ordered:
        fused = functools.partial(
            _fused_,
            divisor=None if scale is None else scale.float().reciprocal(),
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
        )
        if params[0].dtype in _EXACT:
            fused(params, [d.to(params[0].dtype).contiguous() for d in directions], buffers)
        else:
            _in_pieces(fused, params, directions, buffers, rounding)
    elif fast is not None:
        seed, stream = rounding.draw(params[0].device)
        moved = list(params), list(directions), list(buffers)
        fast.descend_(*moved, lr, momentum, weight_decay, seed, stream, ok)
    else:
        plain(params, directions, buffers, lr, momentum, weight_decay, rounding)


def _fused_(
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    buffers: Sequence[Tensor],
    *,
    divisor: Tensor | None,
    lr: Any,
    momentum: float,
    weight_decay: float,
) -> None:
    """PyTorch's kernel on the CPU, of numbers in order and of one dtype, float32 or float64."""
    torch._fused_sgd_(
        list(params),
        list(directions),
        list(buffers),
        grad_scale=divisor,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )


def _in_pieces(
    step: Callable[..., None],
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    buffers: Sequence[Tensor],
    rounding: Rounding,
) -> None:
    """``step`` in float32 on so many numbers at a time that all of it stays in the caches."""
    groups = [params, directions, buffers] if buffers else [params, directions]
    size = min(PIECE, sum(p.numel() for p in params))
    room = torch.empty(len(groups), size, dtype=torch.float32)
    for places in _pieces(groups):
        joined = [each[0] if len(each) == 1 else torch.cat(each) for each in places]
        p, d, *b = [row[: len(t)].copy_(t) for row, t in zip(room, joined, strict=True)]
        step([p], [d], b)
        rounding.round_(joined[0], p)
        for kept, wide in zip(joined[2:], b, strict=True):
            kept.copy_(wide)
        if len(places[0]) > 1:  # else they are the places themselves
            sizes = [len(place) for place in places[0]]
            for kept, into in zip(joined[::2], places[::2], strict=True):
                torch._foreach_copy_(into, kept.split(sizes))


def _pieces(groups: Sequence[Sequence[Tensor]]) -> Iterator[list[list[Tensor]]]:
    """Tensors as vectors, cut alike and put together: at most PIECE numbers at a time."""
    some: list[list[Tensor]] = [[] for _ in groups]
    size = 0
    for tensors in zip(*groups, strict=True):
        vectors = [t.reshape(-1) for t in tensors]
        n = len(vectors[0])
        for start in range(0, n, PIECE):
            count = min(PIECE, n - start)
            if size + count > PIECE:
                yield some
                some, size = [[] for _ in groups], 0
            for group, vector in zip(some, vectors, strict=True):
                group.append(vector if count == n else vector[start : start + count])
            size += count
    if size:
        yield some


def _are_in_order(params: Sequence[Tensor], buffers: Sequence[Tensor]) -> bool:
    """Whether all are on a CPU, of one dtype, and stored in the order of their numbers."""
    dtype = params[0].dtype
    if not params[0].is_cpu:
        return False
    return all(t.dtype == dtype and t.is_contiguous() for t in (*params, *buffers))


def _kernels(
    params: Sequence[Tensor], directions: Sequence[Tensor], buffers: Sequence[Tensor]
) -> ModuleType | None:
    """Ours, where they can take them."""
    narrow = all(t.dtype != torch.float64 for t in (*params, *directions))
    if params[0].is_cuda and narrow and all(t.is_contiguous() for t in (*params, *buffers)):
        return kernels()
    return None


def plain(
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    buffers: Sequence[Tensor],
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    rounded: Callable[[Tensor, torch.dtype], Tensor],
) -> None:
    """:func:`descend` in plain PyTorch."""
    if not params:
        return
    exact = all(p.dtype in _EXACT for p in params)
    wide = list(params) if exact else [p.float() for p in params]
    moves = [d.to(p.dtype) for p, d in zip(wide, directions, strict=True)]
    if weight_decay != 0:
        moves = list(torch._foreach_add(moves, wide, alpha=weight_decay))
    if buffers and exact:
        torch._foreach_mul_(list(buffers), momentum)
        torch._foreach_add_(list(buffers), moves)
        moves = list(buffers)
    elif buffers:
        kept = [b.float() for b in buffers]
        torch._foreach_mul_(kept, momentum)
        torch._foreach_add_(kept, moves)
        torch._foreach_copy_(list(buffers), kept)
        moves = kept
    if isinstance(lr, Tensor):
        torch._foreach_sub_(wide, torch._foreach_mul(moves, lr.to(wide[0])))
    else:
        torch._foreach_add_(wide, moves, alpha=-lr)
    if not exact:
        for p, value in zip(params, wide, strict=True):
            p.copy_(rounded(value, p.dtype))
