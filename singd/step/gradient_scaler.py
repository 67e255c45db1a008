"""Automatic mixed precision: the scale of a GradScaler that calls the step."""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def calling_scale() -> Tensor | None:
    """The scale of the GradScaler that is calling ``step``, if one is.

    It has freed the gradients of its scale by then, but not the statistics of the backward pass.
    An optimizer that it hands the scale (``_step_supports_amp_scaling``) is one whose gradients
    Lightning does not clip, and whose skipped steps accelerate does not see.
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name != "step":
            continue  # f_locals is a copy of them all
        caller = frame.f_locals.get("self")
        if isinstance(caller, torch.amp.GradScaler):
            return torch.tensor(caller.get_scale())
    return None
