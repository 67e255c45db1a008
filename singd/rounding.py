"""Stochastic rounding: small updates of bfloat16 numbers survive on average.

An update below half a unit in the last place (0.4 % in bfloat16) is always lost to rounding to
nearest. Rounded up or down with probability by distance, its expectation is kept.
"""

from __future__ import annotations

import functools
from hashlib import blake2b
from types import ModuleType

import torch
from torch import Tensor

from singd import cuda_graph

_MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10}
_PIECE = 1 << 16  # numbers at a time, in the processor's caches


def stochastic_round(
    x: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None
) -> Tensor:
    """``x`` (float32) in ``dtype``, rounded to one of its two neighbours without bias.

    Args:
        x: Any shape. Rounded stochastically to bfloat16 or float16 (below float16's normal range to
            nearest); converted as usual to any other dtype.
        dtype: Of the result.
        generator: Source of randomness, on the device of ``x``; the default one if ``None``.
    """
    if dtype not in _MANTISSA_BITS:
        return x.to(dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    size = _PIECE if x.is_cpu else max(1, x.numel())
    for piece, place in zip(x.flatten().split(size), out.view(-1).split(size), strict=True):
        place.copy_(_rounded(piece.to(torch.float32), 23 - _MANTISSA_BITS[dtype], generator))
    return out


def _rounded(x: Tensor, dropped: int, generator: torch.Generator | None) -> Tensor:
    """``x [n]`` without so many of its last bits, a multiple of them up or down."""
    words = torch.empty(-(-len(x) // 4), dtype=torch.int64, device=x.device)
    noise = words.random_(-(1 << 63), None, generator=generator).view(torch.int16)[: len(x)]
    noise = noise if dropped == 16 else noise >> (16 - dropped)  # from [-half, half)
    bits = noise.to(torch.int32).add_(x.view(torch.int32))
    bits.add_(1 << (dropped - 1)).bitwise_and_(-1 << dropped)
    return bits.view(torch.float32).add_(x.clamp(-0.0, -0.0))  # NaN, whose sign a carry might reach


def leading(alpha: Tensor, t: Tensor) -> Tensor:
    """View a scalar or ``alpha [b]`` so that it multiplies ``t [b, ...]`` along the first."""
    return alpha.reshape(*alpha.shape, *(1,) * (t.ndim - alpha.ndim)) if alpha.ndim else alpha


class Rounding:
    """Stochastic rounding that a checkpoint reproduces: randomness from a seed and a step number.

    On a GPU a kernel rounds: results there are reproducible too, but are not those of the CPU.
    In a CUDA graph the randomness is PyTorch's own, which is new at every replay.

    Args:
        seed: Any integer.
        step: The number of the step.
        stream: Tells uses within a step apart.
    """

    def __init__(self, seed: int, step: int, stream: int = 0) -> None:
        # Hashed, since the generator of the CPU looks at 32 bits of its seed only.
        digest = blake2b(f"{seed} {step} {stream}".encode(), digest_size=7).digest()
        self.seed = int.from_bytes(digest, "big")
        self.generators: dict[torch.device, torch.Generator] = {}
        self.seeds: dict[torch.device, Tensor] = {}
        self.draws = 0

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``x`` in ``dtype``."""
        if dtype not in _MANTISSA_BITS:
            return x.to(dtype)
        if x.is_cuda and (fast := self.kernels()) is not None:
            rounded: Tensor = fast.stochastic_round(x.float(), dtype, *self.draw(x.device))
            return rounded
        if cuda_graph.capturing():
            return stochastic_round(x, dtype)
        if x.device not in self.generators:
            self.generators[x.device] = torch.Generator(x.device).manual_seed(self.seed)
        return stochastic_round(x, dtype, self.generators[x.device])

    def add_(self, stored: Tensor, x: Tensor, alpha: Tensor) -> None:
        """``stored <- stored + alpha x``, summed in float32 at least and rounded once.

        Args:
            stored: ``[b, ...]``.
            x: Like ``stored``, in float32 or wider.
            alpha: A scalar, or ``[b]``.
        """
        low = stored.dtype in _MANTISSA_BITS and stored.is_contiguous() and alpha.ndim < 2
        if stored.is_cuda and low and (fast := self.kernels()) is not None:
            fast.add_rounded_(stored, x.float(), alpha, *self.draw(stored.device))
        else:
            stored.copy_(self(stored.to(x.dtype) + leading(alpha, stored) * x, stored.dtype))

    def draw(self, device: torch.device) -> tuple[Tensor, int]:
        """The seed on a device, without a wait for it, and a stream that was not drawn before."""
        if device not in self.seeds:
            seed = torch.full((1,), self.seed, dtype=torch.int64, device=device)
            self.seeds[device] = seed.random_() if cuda_graph.capturing() else seed
        self.draws += 16  # a use may take a few streams
        return self.seeds[device], self.draws

    @staticmethod
    def kernels() -> ModuleType | None:
        """:mod:`singd.kernels`, if they and Triton are there."""
        return _kernels()


@functools.cache
def _kernels() -> ModuleType | None:
    try:
        from singd import kernels
    except ImportError:
        return None
    return kernels
