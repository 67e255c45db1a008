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


def local(t: Any) -> Tensor:
    """The numbers of ``t`` that this rank holds, not copied; ``t`` itself if it is whole."""
    if is_distributed(t):
        with torch.no_grad():
            t = t.to_local()
    held: Tensor = t
    return held


def whole(t: Any) -> Tensor:
    """All numbers of ``t``, gathered over the ranks of its mesh; ``t`` itself if it is whole."""
    if is_distributed(t):
        with torch.no_grad():
            t = t.full_tensor()
    gathered: Tensor = t
    return gathered
