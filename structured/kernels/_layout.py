"""What launches share: strides of batches, and how to cut a sum into parts."""

from __future__ import annotations

import torch
from torch import Tensor


def as_batch(X: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """``X [..., n, m]`` as ``[b1, b2, n, m]`` with its strides; a copy only where there must be."""
    if X.ndim > 4:
        X = X.flatten(0, -4)
    X = X[(None,) * (4 - X.ndim)]
    strides = X.stride()  # that of a single item is of no use, and 0 is a multiple of all widths
    return X, tuple(0 if X.shape[d] == 1 and d < 2 else strides[d] for d in range(4))


def parts(columns: int, programs: int, block: int, device: torch.device, least: int) -> int:
    """Columns for each part of a sum, such that the parts of all programs fill the device twice.

    Args:
        columns: Number of columns to share out.
        programs: Number of programs without parts.
        block: A part is a multiple of it.
        device: Device that is to be filled.
        least: Blocks that a part has at least.
    """
    wanted = max(1, 2 * _processors(device) // programs)
    blocks = -(-columns // block)
    return max(-(-blocks // wanted), min(least, blocks), 1) * block


def _processors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
