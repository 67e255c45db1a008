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
_PIECE = 1 << 17  # numbers at a time, in the processor's caches


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
    _Pieces(x.numel(), x.device).round_(out.view(-1), x.flatten(), generator)
    return out


class _Pieces:
    """Stochastic rounding piece by piece in the same memory: fresh memory takes longer.

    So does fresh noise. That of the first piece, shifted by a random number, serves every other:
    it is uniform still, and any two numbers of it are independent. So rounding stays without bias,
    and errors are not correlated.

    Args:
        n: How many numbers there are.
        device: Where.
    """

    def __init__(self, n: int, device: torch.device) -> None:
        self.size = max(1, min(n, _PIECE) if device.type == "cpu" else n)
        self.words = torch.empty(-(-self.size // 4), dtype=torch.int64, device=device)
        self.bits = torch.empty(self.size, dtype=torch.int32, device=device)
        self.wide = torch.empty(self.size, dtype=torch.float32, device=device)
        self.drawn = False

    def round_(self, out: Tensor, x: Tensor, generator: torch.Generator | None) -> None:
        """``out [n] <- x [n]`` without its last bits, a multiple of them up or down."""
        dropped = 23 - _MANTISSA_BITS[out.dtype]
        for place, piece in zip(out.split(self.size), x.split(self.size), strict=True):
            n = len(piece)
            bits = self.bits[:n].copy_(self._noise(generator)[:n])
            if dropped < 16:
                bits.bitwise_right_shift_(16 - dropped)
            # Any NaN as PyTorch's own, which no noise can carry into the sign.
            special = (torch.nan, torch.inf, -torch.inf)
            wide = torch.nan_to_num(piece.to(torch.float32), *special, out=self.wide[:n])
            bits.add_(wide.view(torch.int32))
            place.copy_(bits.bitwise_and_(-1 << dropped).view(torch.float32))

    def _noise(self, generator: torch.Generator | None) -> Tensor:
        """Uniform in 16 bits."""
        if self.drawn:
            shift = torch.empty((), dtype=torch.int16, device=self.words.device)
            shift.random_(-(1 << 15), 1 << 15, generator=generator)
            self.words.view(torch.int16).add_(shift)
        else:
            self.words.random_(-(1 << 63), None, generator=generator)
            self.drawn = True
        return self.words.view(torch.uint16)


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
        self.pieces: dict[torch.device, _Pieces] = {}
        self.seeds: dict[torch.device, Tensor] = {}
        self.draws = 0

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``x`` in ``dtype``."""
        if dtype not in _MANTISSA_BITS:
            return x.to(dtype)
        if x.is_cuda and (fast := kernels()) is not None:
            rounded: Tensor = fast.stochastic_round(x.float(), dtype, *self.draw(x.device))
            return rounded
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        self.round_(out.view(-1), x.flatten())
        return out

    def round_(self, out: Tensor, x: Tensor) -> None:
        """``out [n] <- x [n]`` in plain PyTorch, ``out`` in bfloat16 or float16."""
        device, n = x.device, len(x)
        if device not in self.pieces or self.pieces[device].size < min(n, _PIECE):
            self.pieces[device] = _Pieces(n, device)
        generator = None
        if not cuda_graph.capturing():
            if device not in self.generators:
                self.generators[device] = torch.Generator(device).manual_seed(self.seed)
            generator = self.generators[device]
        self.pieces[device].round_(out, x, generator)

    def add_(self, stored: Tensor, x: Tensor, alpha: Tensor) -> None:
        """``stored <- stored + alpha x``, summed in float32 at least and rounded once.

        Args:
            stored: ``[b, ...]``.
            x: Like ``stored``, in float32 or wider.
            alpha: A scalar, or ``[b]``.
        """
        low = stored.dtype in _MANTISSA_BITS and stored.is_contiguous() and alpha.ndim < 2
        if stored.is_cuda and low and (fast := kernels()) is not None:
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


@functools.cache
def kernels() -> ModuleType | None:
    """:mod:`singd.kernels`, if they and Triton are there."""
    try:
        from singd import kernels as fast
    except ImportError:
        return None
    return fast
