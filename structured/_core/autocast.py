"""Operators compute in the precision of their numbers: autocast is off within their methods.

Autocast would run the matrix products of a method in 16 bits and leave the sums beside them alone:
a member would come back in two dtypes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

COMPUTE = {
    *("to_dense", "matmul", "apply", "apply_transpose", "apply_overwriting", "apply_rows"),
    *("apply_matrix", "solve", "solve_transpose", "project", "project_gram", "gram"),
    *("orthogonal_project", "orthogonal_project_gram"),
    *("outer", "_outer", "congruence", "trace", "trace_product", "add_scaled_identity"),
    *("logdet", "max_abs", "frobenius_norm", "inverse", "solve_member"),
    *("exp", "diagonal", "squared_rows", "spectral_norm"),
}


def compute_without_autocast(cls: type) -> None:
    """Wrap the methods of :data:`COMPUTE` that ``cls`` defines itself."""
    for name in COMPUTE & cls.__dict__.keys():
        setattr(cls, name, _without_autocast(cls.__dict__[name]))


def _without_autocast(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapper(self: Any, *arguments: Any) -> Any:
        # One call tells it for all types of devices; the public functions ask for one.
        if not torch._C._is_any_autocast_enabled():
            return method(self, *arguments)
        device = self.device.type
        if not torch.amp.is_autocast_available(device):  # such as meta
            return method(self, *arguments)
        with torch.autocast(device, enabled=False):
            return method(self, *arguments)

    return wrapper
