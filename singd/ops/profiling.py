"""Parts of a step that profilers show by name."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def scope(name: str) -> AbstractContextManager[Any]:
    """What profilers show by name; nothing where none is at work, since names take time as well."""
    return torch.profiler.record_function(name) if is_profiled() else nullcontext()


def is_profiled() -> bool:
    """Whether a profiler is at work."""
    return not torch.compiler.is_compiling() and torch._C._autograd._profiler_enabled()
