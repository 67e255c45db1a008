"""FFTs along dimension -1 of any real tensor, empty ones too, in float32 at least.

torch.fft has no bfloat16, and on the CPU it refuses empty batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structured._core.matrix import at_least_float32


def _complex(dtype: torch.dtype) -> torch.dtype:
    """The complex type of a spectrum; torch.compile does not read ``dtype.to_complex()``."""
    return torch.promote_types(dtype, torch.complex64)


def fft(t: Tensor) -> Tensor:
    """Discrete Fourier transform of ``t [..., n]``."""
    t = t.to(at_least_float32(t.dtype))
    return torch.fft.fft(t) if t.numel() else t.to(_complex(t.dtype))


def rfft(t: Tensor, length: int) -> Tensor:
    """Half spectrum ``[..., length // 2 + 1]`` of ``t [..., n]``, zero-padded to ``length``."""
    t = t.to(at_least_float32(t.dtype))
    if t.numel():
        return torch.fft.rfft(t, length)
    return t.new_zeros((*t.shape[:-1], length // 2 + 1), dtype=_complex(t.dtype))


def irfft(F: Tensor, length: int) -> Tensor:
    """The real series ``[..., length]`` with the half spectrum ``F``."""
    if F.numel() and length:
        return torch.fft.irfft(F, length)
    return F.real.new_zeros((*F.shape[:-1], length))


def fft_length(n: int) -> int:
    """The least length ``2^a 3^b 5^c`` of at least ``2n - 1``: no wrap-around, and fast."""
    return smooth_length(max(2 * n - 1, 1))


def smooth_length(length: int) -> int:
    """The least length ``2^a 3^b 5^c`` of at least ``length``."""
    while not _is_smooth(length):
        length += 1
    return length


def factors(n: int, largest: int) -> tuple[int, int]:
    """``(p, q)`` with ``p q = n``, the largest ``q`` that is no more than ``largest``."""
    q = next(q for q in range(largest, 0, -1) if n % q == 0)
    return len(range(n // q)), q  # an int also where torch.compile has a symbol for n


def _is_smooth(k: int) -> bool:
    for prime in (2, 3, 5):
        while k % prime == 0:
            k //= prime
    return k == 1
