"""Sums over many tensors, and arithmetic on what is one number for each layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from singd.ops import dispatch, reference
from singd.ops.grouping import grouped

_PIECE = 1 << 18  # numbers of low precision that are made wide at a time


def inner_product(X: Tensor, Y: Tensor) -> Tensor:
    """Numbers ``[k]`` that add up to ``sum_ij X_ij Y_ij`` over all dimensions, in float32 at least.

    Reference: :func:`singd.ops.reference.inner_product`. On a GPU in one pass over 16-bit numbers.
    """
    x, y = X.flatten(), Y.flatten()
    if x.dtype.itemsize >= 4:
        return torch.dot(x, y).view(1)
    if (kernels := dispatch.kernels_for(x)) is not None:
        return kernels.inner_product(x, y)
    size = _PIECE if x.is_cpu else max(1, len(x))
    pieces = zip(x.split(size), y.split(size), strict=True)
    return torch.stack([reference.inner_product(one, other) for one, other in pieces])


def total(parts: Sequence[Tensor]) -> Tensor:
    """The sum of all numbers in some tensors, on the device of the first."""
    if len(parts) == 1:
        return parts[0].sum() if parts[0].ndim else parts[0]
    return torch.cat([part.reshape(-1).to(parts[0].device) for part in parts]).sum()


def all_finite(tensors: Sequence[Tensor], order: float) -> Tensor:
    """Whether no number is infinite or NaN: a truth value on the device, by norms of ``order``.

    The norm of order 2, which is the fast one on a CPU, may itself overflow; that of infinity
    cannot.
    """
    norms = torch._foreach_norm(list(tensors), order)
    return torch.stack([n.to(norms[0].device) for n in norms]).isfinite().all()


def leading(alpha: Tensor, t: Tensor) -> Tensor:
    """A scalar or ``alpha [b]``, viewed so that it multiplies ``t [b, ...]`` along the first."""
    return alpha.reshape(*alpha.shape, *(1,) * (t.ndim - alpha.ndim)) if alpha.ndim else alpha


def jointly(
    function: Callable[..., Tensor], sizes: Sequence[int], *numbers: Sequence[Tensor]
) -> list[Tensor]:
    """``function(x, y, ..., n)``, number by number, of tensors ``x`` of many layers at once.

    Worked out layer by layer, one number costs as much time as a product of small factors.

    Args:
        function: Function of vectors.
        sizes: Size ``n`` of each layer.
        numbers: Tensors of each layer, for each argument; of one shape for all arguments.
    """
    out: list[Tensor] = [*numbers[0]]
    for there in grouped(range(len(out)), lambda i: numbers[0][i].device):
        vectors = [torch.cat([each[i].flatten() for i in there]) for each in numbers]
        counts = tuple((max(sizes[i], 1), out[i].numel()) for i in there)
        repeat = _repeat if torch.compiler.is_compiling() else _cached_repeat  # it ignores caches
        results = function(*vectors, repeat(counts, vectors[0].dtype, vectors[0].device))
        for i, result in zip(there, results.split([k for _, k in counts]), strict=True):
            shaped = result if out[i].ndim == 1 else result.view(out[i].shape)
            out[i] = shaped if shaped.dtype == out[i].dtype else shaped.to(out[i].dtype)
    return out


def _repeat(
    counts: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``n`` for ``k`` times, for each pair."""
    return torch.tensor([n for n, k in counts for _ in range(k)], dtype=dtype, device=device)


_cached_repeat = functools.lru_cache(64)(_repeat)  # made once: a copy to the device may wait
