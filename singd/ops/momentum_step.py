"""The step of the parameters: weight decay, momentum, and a sum that is never rounded to nearest.

Reference: :func:`singd.ops.reference.momentum_step_`. One kernel moves many parameters: ours on a
GPU, that of :class:`torch.optim.SGD` on a CPU; PyTorch's ``foreach`` operations elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from singd.ops import dispatch, reference
from singd.ops.reference import EXACT, Indices
from singd.ops.stochastic_rounding import WHOLE, Rounding, name_keys

_COPIED = 1 << 18


def momentum_step_(
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    buffers: Sequence[Tensor],
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    decoupled: bool,
    rounding: Rounding,
    names: Sequence[str],
    indices: Sequence[Indices] | None = None,
    scale: Tensor | None = None,
    unless: Tensor | None = None,
) -> None:
    """``b <- momentum b + s d`` and ``p <- (1 - lr weight_decay) p - lr b``, in place.

    Below float32 the sums run in float32, ``p`` is rounded stochastically and ``b`` to nearest.

    Args:
        params: Parameters ``p``, all on one device.
        directions: Directions ``d``; overwritten if there is a ``scale``.
        buffers: Momenta ``b``, like ``params``; empty for no momentum.
        lr: Step size; a tensor, which a CUDA graph reads anew, costs one more pass.
        momentum: Momentum in [0, 1).
        weight_decay: Weight decay, not negative.
        decoupled: Decay as above (AdamW's); otherwise ``weight_decay p`` is added to ``s d``.
        rounding: Stochastic rounding of this step.
        names: Names of the parameters, which the rounding depends on.
        indices: Places of the numbers of every ``p`` within the tensor of that name, of which it
            may be a part; all in order if ``None``.
        scale: Factor ``s`` of the directions, a scalar; 1 if ``None``.
        unless: Truth value on the device of ``params``: if it is true, nothing changes.
    """
    if not params:
        return
    fast = None if isinstance(lr, Tensor) else _kernels(params, directions, buffers)
    if unless is not None and fast is None:
        places = [*params, *buffers]
        before = [place.clone() for place in places]
        options: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        options |= {
            "decoupled": decoupled,
            "rounding": rounding,
            "names": names,
            "indices": indices,
        }
        momentum_step_(params, directions, buffers, **options, scale=scale)
        for place, old in zip(places, before, strict=True):
            torch.where(unless, old, place, out=place)
        return
    fused = fast is None and _is_fused(params, buffers)
    if scale is not None and not (fused and params[0].dtype == torch.float32):
        directions = list(directions)
        torch._foreach_mul_(directions, scale.to(directions[0]))
        scale = None
    if fast is not None:
        keys = name_keys(tuple(names), params[0].device), rounding.word(params[0].device)
        numbers = lr, momentum, weight_decay, decoupled
        are_parts = indices is not None and any(each != WHOLE for each in indices)
        boxes = [number for each in indices or () for number in each] if are_parts else None
        fast.momentum_step_(
            list(params), list(directions), list(buffers), *numbers, *keys, unless, boxes
        )
        return
    if fused:
        if decoupled and weight_decay:
            decay = 1.0 - lr * weight_decay
            torch._foreach_mul_(
                list(params), decay.to(params[0]) if isinstance(decay, Tensor) else decay
            )
        _fused_sgd_(
            params, directions, buffers, scale, lr, momentum, 0.0 if decoupled else weight_decay
        )
        return

    def rounded(x: Tensor, dtype: torch.dtype, index: int) -> Tensor:
        return rounding(x[None], dtype, [names[index]], indices[index] if indices else WHOLE)[0]

    numbers = lr, momentum, weight_decay, decoupled
    reference.momentum_step_(params, directions, buffers, *numbers, rounded)


def _fused_sgd_(
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    buffers: Sequence[Tensor],
    scale: Tensor | None,
    lr: Any,
    momentum: float,
    weight_decay: float,
) -> None:
    """PyTorch's kernel on the CPU, of dense numbers in float32 or float64.

    Directions that are parts of larger tensors are copied, about ``_COPIED`` numbers at a time.
    """
    unscale = None if scale is None else scale.float().reciprocal()
    packed: list[Tensor] = []
    start = copied = 0
    for end, d in enumerate(directions, 1):
        packed.append(_packed(d, params[0].dtype))
        copied += d.numel() if packed[-1] is not d else 0
        if copied < _COPIED and end < len(params):
            continue
        some = slice(start, end)
        torch._fused_sgd_(
            list(params[some]),
            packed,
            list(buffers[some]),
            grad_scale=unscale,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )
        start, copied, packed = end, 0, []


def _packed(d: Tensor, dtype: torch.dtype) -> Tensor:
    """A direction as the kernel reads it; to ask for what is there takes time as well."""
    return d if d.dtype == dtype and d.is_contiguous() else d.to(dtype).contiguous()


def _is_fused(params: Sequence[Tensor], buffers: Sequence[Tensor]) -> bool:
    """Whether all are on a CPU, of one data type, and stored in the order of their numbers."""
    dtype = params[0].dtype
    if not params[0].is_cpu or dtype not in EXACT:
        return False
    return all(t.dtype == dtype and t.is_contiguous() for t in (*params, *buffers))


def _kernels(
    params: Sequence[Tensor], directions: Sequence[Tensor], buffers: Sequence[Tensor]
) -> ModuleType | None:
    """Our kernels, where they can take the tensors."""
    found = dispatch.kernels_for(params[0])
    narrow = found and all(t.dtype != torch.float64 for t in (*params, *directions))
    return found if narrow and all(t.is_contiguous() for t in (*params, *buffers)) else None
