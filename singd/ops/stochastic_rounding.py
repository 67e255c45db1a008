"""Stochastic rounding: small updates of bfloat16 numbers survive on average.

An update below half a unit in the last place (0.4 % in bfloat16) is always lost to rounding to
nearest. Rounded up or down with probability by distance, its expectation is right.

The random bits of a number are a function of (seed, step, name, index): a hash, not a generator
that is drawn from in some order. So results depend neither on how tensors are batched nor on how
they are distributed over ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from singd.ops import cuda_graph, dispatch
from singd.ops.reference import (
    MANTISSA_BITS,
    Indices,
    mix_,
    noise,
    noise_at,
    round_with_noise,
)

WHOLE = Indices()
"""Those of a whole tensor."""

_PIECE = 1 << 17  # numbers at a time on a CPU: in its caches


@functools.lru_cache(256)
def name_keys(names: tuple[str, ...], device: torch.device) -> Tensor:
    """A 64-bit hash of every name, ``[b]``; made once, since a copy to the device may wait."""
    return torch.tensor([_hash(name) for name in names], dtype=torch.int64, device=device)


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


class Rounding:
    """Stochastic rounding that a checkpoint reproduces, with noise from a seed and a step number.

    In a CUDA graph the seed of a step is PyTorch's own random number, new at every replay.

    Args:
        seed: Any integer.
        step: Number of the step.
    """

    def __init__(self, seed: int, step: int) -> None:
        self._seed = _hash(f"{seed} {step}")
        self._words: dict[torch.device, Tensor] = {}

    def word(self, device: torch.device) -> Tensor:
        """The seed of this step as one int64 on a device, without a copy from the host."""
        if device not in self._words:
            word = torch.full((1,), self._seed, dtype=torch.int64, device=device)
            self._words[device] = word.random_() if cuda_graph.is_capturing() else word
        return self._words[device]

    def keys(self, names: Sequence[str], device: torch.device) -> Tensor:
        """The keys of the :func:`noise` of some tensors, ``[b]``."""
        return mix_(name_keys(tuple(names), device) + self.word(device))

    def noise(self, x: Tensor, names: Sequence[str], bits: int = 16) -> Tensor:
        """Uniform integers of some bits, int32, one for each number of ``x [b, ...]``."""
        count = x.numel() // max(len(names), 1)
        words = noise(self.keys(names, x.device), 0, count)
        return words.bitwise_right_shift_(16 - bits).view(x.shape)

    def __call__(
        self, x: Tensor, dtype: torch.dtype, names: Sequence[str], indices: Indices = WHOLE
    ) -> Tensor:
        """``x`` in ``dtype``, rounded to one of its two neighbours without bias.

        Args:
            x: Numbers ``[b, ...]``, one item for each name.
            dtype: bfloat16 or float16 for stochastic rounding; a conversion as usual for any other.
            names: Names of the items, which the noise depends on.
            indices: Places of the numbers of every item, if it is a part of a larger tensor.
        """
        if dtype not in MANTISSA_BITS:
            return x.to(dtype)
        flat = x.float().reshape(len(names), -1)
        is_run = indices.width == indices.stride
        if is_run and (kernels := dispatch.kernels_for(x)) is not None:
            key = name_keys(tuple(names), x.device), self.word(x.device)
            return kernels.stochastic_round(flat, dtype, *key, indices.start).view(x.shape)
        return self.plain(flat, dtype, names, indices).view(x.shape)

    def plain(
        self, x: Tensor, dtype: torch.dtype, names: Sequence[str], indices: Indices = WHOLE
    ) -> Tensor:
        """The same for ``x [b, n]`` in float32, by PyTorch's operators."""
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        keys = self.keys(names, x.device)
        for rows, first, last in _pieces(len(x), x.shape[1], x.device):
            if indices.width == indices.stride:
                piece = noise(keys[rows], indices.start + first, last - first)
            else:
                places = indices.of(torch.arange(first, last, device=x.device))
                piece = noise_at(keys[rows], places)
            out[rows, first:last] = round_with_noise(x[rows, first:last], dtype, piece)
        return out


def stochastic_round(
    x: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None
) -> Tensor:
    """``x`` in ``dtype``, rounded to one of its two neighbours without bias.

    Args:
        x: Numbers of any shape. Rounded stochastically to bfloat16 or float16 (below float16's
            normal range to nearest); converted as usual to any other data type.
        dtype: Data type of the result.
        generator: Source of randomness, on the device of ``x``; the default one if ``None``.
    """
    if dtype not in MANTISSA_BITS:
        return x.to(dtype)
    seed = torch.empty(1, dtype=torch.int64, device=x.device)
    keys = seed.random_(-(1 << 63), None, generator=generator)
    return round_with_noise(x.float(), dtype, noise(keys, 0, x.numel()).view(x.shape))


def _pieces(b: int, n: int, device: torch.device) -> Iterator[tuple[slice, int, int]]:
    """Parts of ``[b, n]`` that fit a CPU's caches: rows, first and last column."""
    if device.type != "cpu" or b * n <= _PIECE:
        yield slice(None), 0, n
        return
    rows = max(1, _PIECE // max(n, 1))
    for row in range(0, b, rows):
        for first in range(0, n, _PIECE):
            yield slice(row, row + rows), first, min(first + _PIECE, n)
