"""Which of the two forms of an operation runs: a kernel on a GPU, plain PyTorch anywhere else."""

from __future__ import annotations

import functools
from types import ModuleType

from torch import Tensor


def kernels_for(x: Tensor) -> ModuleType | None:
    """:mod:`singd.ops.kernels`, if they are there and may serve a tensor."""
    return load_kernels() if x.is_cuda else None


@functools.cache
def load_kernels() -> ModuleType | None:
    """:mod:`singd.ops.kernels`, if their folder and that of :mod:`structured.kernels` are there."""
    try:
        from singd.ops import kernels
    except ImportError:
        return None
    return kernels
