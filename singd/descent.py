"""The step of the parameters: weight decay, momentum, and a sum that is never rounded to nearest.

One kernel does it for many parameters: ours on a GPU, on the CPU that of :class:`torch.optim.SGD`;
elsewhere PyTorch's ``foreach`` operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from singd.rounding import Rounding

_EXACT = (torch.float32, torch.float64)


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
    """
    if not params:
        return
    by_torch = _takes_sgd(params, buffers)
    if scale is not None and not (by_torch and all(p.dtype == torch.float32 for p in params)):
        directions = list(directions)
        torch._foreach_mul_(directions, scale.to(directions[0]))
        scale = None
    kernels = None if by_torch or isinstance(lr, Tensor) else _kernels(params, directions, buffers)
    if by_torch:
        dtype = params[0].dtype
        torch._fused_sgd_(
            params,
            [d.to(dtype).contiguous() for d in directions],
            buffers,
            grad_scale=None if scale is None else 1.0 / scale.to(dtype),  # it divides by that
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )
    elif kernels is not None:
        seed, stream = rounding.draw(params[0].device)
        moved = list(params), list(directions), list(buffers)
        kernels.descend_(*moved, lr, momentum, weight_decay, seed, stream)
    else:
        plain(params, directions, buffers, lr, momentum, weight_decay, rounding)


def _takes_sgd(params: Sequence[Tensor], buffers: Sequence[Tensor]) -> bool:
    """Whether PyTorch's kernel can take them: on a CPU, of one dtype, at their place."""
    dtype = params[0].dtype
    if not params[0].is_cpu or dtype not in _EXACT:
        return False
    return all(t.dtype == dtype and t.is_contiguous() for t in (*params, *buffers))


def _kernels(
    params: Sequence[Tensor], directions: Sequence[Tensor], buffers: Sequence[Tensor]
) -> ModuleType | None:
    """Ours, where they can take them."""
    narrow = all(t.dtype != torch.float64 for t in (*params, *directions))
    if params[0].is_cuda and narrow and all(t.is_contiguous() for t in (*params, *buffers)):
        return Rounding.kernels()
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
