"""Arithmetic on what is one number for each layer: for all layers at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def jointly(
    function: Callable[..., Tensor], sizes: Sequence[int], *numbers: Sequence[Tensor]
) -> list[Tensor]:
    """``function(x, y, ..., n)``, number by number, of tensors ``x`` of many layers at once.

    Args:
        function: Of vectors.
        sizes: The ``n`` of each layer.
        numbers: For each argument a tensor of each layer, of one shape for all arguments.
    """
    out: list[Tensor] = [*numbers[0]]
    for device in {x.device for x in out}:
        there = [i for i, x in enumerate(out) if x.device == device]
        vectors = [torch.cat([each[i].flatten() for i in there]) for each in numbers]
        counts = tuple((max(sizes[i], 1), out[i].numel()) for i in there)
        repeat = _repeat if torch.compiler.is_compiling() else _repeated  # it passes caches by
        results = function(*vectors, repeat(counts, vectors[0].dtype, device))
        for i, result in zip(there, results.split([k for _, k in counts]), strict=True):
            shaped = result if out[i].ndim == 1 else result.view(out[i].shape)
            out[i] = shaped if shaped.dtype == out[i].dtype else shaped.to(out[i].dtype)
    return out


def _repeat(
    counts: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``n`` for ``k`` times, for each pair."""
    return torch.tensor([n for n, k in counts for _ in range(k)], dtype=dtype, device=device)


_repeated = functools.lru_cache(64)(_repeat)  # made once, since that waits for the device
