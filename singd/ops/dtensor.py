"""Tensors of which a rank holds a part: :class:`torch.distributed.tensor.DTensor`.

They are known by their attributes, so that :mod:`torch.distributed` need not be imported. What is
made of them here is not differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_distributed(t: Any) -> bool:
    """Whether ``t`` is a DTensor."""
    return hasattr(t, "device_mesh")


@torch.no_grad()
def local(t: Tensor) -> Tensor:
    """The numbers of ``t`` that this rank holds, not copied; ``t`` itself if it is whole."""
    if not is_distributed(t):
        return t
    part: Tensor = t.to_local()  # type: ignore[attr-defined]
    return part


@torch.no_grad()
def whole(t: Tensor) -> Tensor:
    """All numbers of ``t``, gathered over the ranks of its mesh; ``t`` itself if it is whole."""
    if not is_distributed(t):
        return t
    full: Tensor = t.full_tensor()  # type: ignore[attr-defined]
    return full
