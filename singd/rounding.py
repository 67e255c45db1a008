"""Stochastic rounding: small updates of bfloat16 numbers survive on average.

An update below half a unit in the last place (0.4 % in bfloat16) is always lost to rounding to
nearest. Rounded up or down with probability by distance, its expectation is kept.
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor

_MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10}


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
    dropped = 1 << (23 - _MANTISSA_BITS[dtype])
    x = x.to(torch.float32)
    noise = torch.randint(dropped, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    rounded = ((x.view(torch.int32) + noise) & -dropped).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(dtype)  # noise may carry a NaN into the sign


class Rounding:
    """Stochastic rounding that a checkpoint reproduces: randomness from a seed and a step number.

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

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``x`` in ``dtype``."""
        if dtype in _MANTISSA_BITS and x.device not in self.generators:
            self.generators[x.device] = torch.Generator(x.device).manual_seed(self.seed)
        return stochastic_round(x, dtype, self.generators.get(x.device))
