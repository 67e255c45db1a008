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
            return t.to_local()
    return t


def columns_of(t: Any, group: Any, columns: slice) -> Tensor:
    """This rank's columns of ``t [..., n]``, which are not gathered if it holds just these.

    The ranks of ``group`` have the others.
    """
    mesh = t.device_mesh if is_distributed(t) else None
    names = [] if mesh is None else [mesh.get_group(i).group_name for i in range(mesh.ndim)]
    if group.group_name not in names:
        return whole(t)[..., columns]
    from torch.distributed.tensor import Replicate, Shard  # takes time to import

    wanted = [Shard(t.ndim - 1) if name == group.group_name else Replicate() for name in names]
    with torch.no_grad():
        return t.redistribute(placements=wanted).to_local()


def whole(t: Any) -> Tensor:
    """All numbers of ``t``, gathered over the ranks of its mesh; ``t`` itself if it is whole."""
    if is_distributed(t):
        with torch.no_grad():
            return t.full_tensor()
    return t
