"""Block-circulant matrices: cyclic convolutions of vectors, block-diagonal in the Fourier basis.

::

    A C B
    B A C        k n numbers, products O(n (k + log n))
    C B A
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Size, Tensor

from structured._core.checks import check_pivots
from structured._core.matrix import Scalar, StructuredMatrix, at_least_float32, largest
from structured._core.numbers import above_rounding, largest_singular_value, tabulated
from structured._transforms.fft import irfft, rfft
from structured.dense import Dense

# In the Fourier basis a complex block ``F`` is held as its real and imaginary parts on top of each
# other, ``[2 k, m]``, and as a factor as ``[[Re, -Im], [Im, Re]]``, whose transpose is that of F^H.

_BY_PRODUCT = 64  # blocks; up to here a product beats an FFT, which has to transpose (measured)


def _spectrum(blocks: Tensor, p: int) -> Tensor:
    """FFT over the ``p`` blocks ``[..., p, k, m]``: half of it, ``[..., p // 2 + 1, 2 k, m]``."""
    wide, (k, m) = blocks.to(at_least_float32(blocks.dtype)), blocks.shape[-2:]
    if _by_product(p, wide):
        waves, _ = _waves(len(range(p)), dtype=wide.dtype)
        F = waves @ wide.reshape(*wide.shape[:-2], k * m)
        return F.reshape(*F.shape[:-2], p // 2 + 1, 2 * k, m)
    F = torch.view_as_real(rfft(wide.movedim(-3, -1), p))  # [..., k, m, p // 2 + 1, 2]
    return F.movedim((-2, -1), (-4, -3)).flatten(-3, -2)


def _series(F: Tensor, p: int) -> Tensor:
    """Inverse of :func:`_spectrum`."""
    half, (k, m) = F.shape[:-2], (F.shape[-2] // 2, F.shape[-1])
    if _by_product(p, F):
        _, back = _waves(len(range(p)), dtype=F.dtype)
        Y = back @ F.reshape(*half[:-1], 2 * half[-1], k * m)
        return Y.reshape(*half[:-1], p, k, m)
    return irfft(torch.complex(*F.chunk(2, -2)).movedim(-3, -1), p).movedim(-1, -3)


def _by_product(p: int, X: Tensor) -> bool:
    """A GPU transposes fast."""
    return X.is_cpu and 0 < p <= _BY_PRODUCT


@tabulated
def _waves(p: int) -> tuple[np.ndarray, ...]:
    """``cos`` and ``-sin`` of ``2 pi i j / p`` in turn, ``[2 (p // 2 + 1), p]``; the way back."""
    half = np.arange(p // 2 + 1)
    angles = np.outer(half, np.arange(p)) % p * (2 * math.pi / p)
    waves = np.stack([np.cos(angles), -np.sin(angles)], 1)
    count = np.where(half % (p / 2) == 0, 1, 2)  # 0 and p / 2 have no conjugate beside them
    back = count[:, None, None] * waves / p
    return waves.reshape(-1, p), np.ascontiguousarray(back.reshape(-1, p).T)


def _as_factor(F: Tensor) -> Tensor:
    """``[[Re, -Im], [Im, Re]]``."""
    real, imaginary = F.chunk(2, -2)
    return torch.cat([F, torch.cat([-imaginary, real], -2)], -1)


class BlockCirculant(StructuredMatrix):
    """Blocks ``A_{(i - j) mod p}`` of size ``k``, ``p = n / k``: circulant matrices with matrices.

    Stores k n numbers; ``A X`` costs n (k + log n) a column. With channels as blocks this is a
    convolution with periodic boundaries, all channels coupled.
    """

    blocks: Tensor  # [..., p, k, k], the first column of blocks

    dimensions = ("p k k",)

    closed_under_transpose = True

    @classmethod
    def zeros(cls, n: int, k: int, *, batch_shape: Sequence[int] = (), **opts: Any) -> Self:
        """The zero matrix of size ``n`` with blocks of size ``k``.

        Raises:
            ValueError: If ``k`` is not a positive integer that divides ``n``.
        """
        if not isinstance(k, int) or k < 1 or n % k:
            raise ValueError(
                f"block_circulant(k): expected an integer k >= 1 that divides {n}, got {k!r}"
            )
        return cls(torch.zeros(*batch_shape, n // k, k, k, **opts))

    def to_dense(self) -> Tensor:
        """Every wrapped diagonal of blocks filled with its block."""
        ramp = torch.arange(self._sizes[0], device=self.blocks.device)
        grid = self.blocks[..., (ramp[:, None] - ramp) % max(len(ramp), 1), :, :]
        return grid.movedim(-2, -3).reshape(self.shape)  # [..., p, p, k, k] -> [..., p, k, p, k]

    @property
    def _sizes(self) -> tuple[int, int]:
        """``(p, k)``."""
        return self.blocks.shape[-3], self.blocks.shape[-1]

    @property
    def shape(self) -> Size:
        """``[..., n, n]``."""
        p, k = self._sizes
        return Size((*self.blocks.shape[:-3], p * k, p * k))

    @property
    def mT(self) -> Self:
        """``A_i`` becomes ``A_{-i}^T``."""
        first, others = self.blocks[..., :1, :, :], self.blocks[..., 1:, :, :]
        return self._build([torch.cat([first, others.flip(-3)], -3).mT])

    @property
    def _eigenblocks(self) -> Tensor:
        """The first ``p // 2 + 1`` blocks in the Fourier basis; the others are their conjugates."""
        return _spectrum(self.blocks, self._sizes[0])

    @property
    def _factors(self) -> Tensor:
        """The same to multiply with."""
        return _as_factor(self._eigenblocks)

    def _with_eigenblocks(self, F: Tensor) -> Self:
        return self._build([_series(F, self._sizes[0]).to(self.dtype).contiguous()])

    def _split(self, X: Tensor) -> Tensor:
        """The spectrum of ``X [..., n, m]`` over its blocks of rows."""
        return _spectrum(X.unflatten(-2, self._sizes), self._sizes[0])

    def _join(self, F: Tensor, dtype: torch.dtype) -> Tensor:
        """Inverse of :meth:`_split`."""
        return _series(F, self._sizes[0]).to(dtype).flatten(-3, -2)

    def matmul(self, other: Self) -> Self:
        """Cyclic convolution of the blocks."""
        return self._with_eigenblocks(self._factors @ other._eigenblocks)

    def apply(self, X: Tensor) -> Tensor:
        """Cyclic convolution of every column of ``X [..., n, m]``."""
        return self._join(self._factors @ self._split(X), X.dtype)

    def apply_transpose(self, X: Tensor) -> Tensor:
        """Cyclic correlation of every column of ``X [..., n, m]``."""
        return self._join(self._factors.mT @ self._split(X), X.dtype)

    def orthogonal_project(self, M: Tensor) -> Self:
        """Means of the wrapped diagonals of blocks of ``M [..., n, n]``."""
        p = self._sizes[0]
        grid = M.unflatten(-1, self._sizes).unflatten(-3, self._sizes).movedim(-3, -2)
        row = torch.arange(p, device=M.device)
        diagonals = grid[..., row, (row - row[:, None]) % max(p, 1), :, :]  # [..., p, p, k, k]
        sums = diagonals.sum(-3, dtype=at_least_float32(M.dtype))
        return self._build([(sums / max(p, 1)).to(M.dtype)])

    def project(self, S: Tensor) -> Self:
        """Means of the wrapped diagonals of blocks of ``S [..., n, n]``."""
        return self.orthogonal_project(S)

    def project_gram(self, X: Tensor) -> Self:
        """Cyclic autocorrelation of the columns of ``X [..., n, m]``."""
        p, k = self._sizes
        F = self._split(X)
        products = (F @ F.mT).unflatten(-1, (2, k)).unflatten(-3, (2, k))
        real = products[..., 0, :, 0, :] + products[..., 1, :, 1, :]
        imaginary = products[..., 1, :, 0, :] - products[..., 0, :, 1, :]
        return self._with_eigenblocks(torch.cat([real, imaginary], -2) / max(p, 1))

    def gram(self) -> Self:
        """``A^T A``, which is block-circulant."""
        F = self._eigenblocks
        return self._with_eigenblocks(_as_factor(F).mT @ F)

    def exp(self) -> Self:
        """Block by block in the Fourier basis, k^2 n."""
        if not self.n:
            return self.clone()
        return self._with_eigenblocks(torch.linalg.matrix_exp(self._factors)[..., : self._sizes[1]])

    def diagonal(self) -> Tensor:
        """That of ``A_0``, p times."""
        first = self.blocks[..., :1, :, :].diagonal(dim1=-2, dim2=-1)
        return first.expand(*first.shape[:-2], *self._sizes).flatten(-2).clone()

    def trace(self) -> Tensor:
        """``p tr A_0``."""
        first = self.blocks[..., :1, :, :].diagonal(dim1=-2, dim2=-1)
        return self._sizes[0] * first.sum((-2, -1))

    def add_scaled_identity(self, alpha: Scalar) -> Self:
        """Add to ``A_0``."""
        first, others = self.blocks[..., :1, :, :], self.blocks[..., 1:, :, :]
        if isinstance(alpha, Tensor) and alpha.ndim:
            alpha = alpha[..., None].expand(first.shape[:-2])
        return self._build([torch.cat([Dense(first).add_scaled_identity(alpha).M, others], -3)])

    def solve(self, X: Tensor) -> Tensor:
        """Block by block in the Fourier basis, k^2 n once.

        Raises:
            RuntimeError: If ``A`` is singular (``torch.linalg.LinAlgError``), a block in the
                Fourier basis zero but for rounding.
        """
        if not self.n:
            return super().solve(X)
        F, Y = self._pivots(), self._split(X)
        Y = Y[(None,) * (F.ndim - Y.ndim)]  # or a stack of vectors is seen where the shapes allow
        return self._join(torch.linalg.solve(F, Y), X.dtype)

    def inverse(self) -> Self:
        """Block by block in the Fourier basis, k^2 n.

        Raises:
            RuntimeError: As :meth:`solve`.
        """
        if not self.n:
            return self.clone()
        return self._with_eigenblocks(torch.linalg.inv(self._pivots())[..., : self._sizes[1]])

    def _pivots(self) -> Tensor:
        """The blocks in the Fourier basis, if none is zero."""
        check_pivots(above_rounding(self._eigenblocks.abs().amax((-2, -1))))
        return self._factors

    def logdet(self) -> Tensor:
        """Sum over the blocks in the Fourier basis."""
        half, p = torch.linalg.slogdet(self._factors).logabsdet / 2, self._sizes[0]
        return torch.cat([half, half[..., 1 : (p + 1) // 2]], -1)[..., :p].sum(-1).to(self.dtype)

    def max_abs(self) -> Tensor:
        """Largest absolute entry."""
        return largest(self.blocks, self.blocks.ndim - 3)

    def spectral_norm(self) -> Tensor:
        """The largest of the blocks' in the Fourier basis, k^2 n."""
        return largest_singular_value(self._factors).amax(-1).to(self.dtype)

    def frobenius_norm(self) -> Tensor:
        """``sqrt(p)`` times that of the first column of blocks."""
        return math.sqrt(self._sizes[0]) * torch.linalg.vector_norm(self.blocks, dim=(-3, -2, -1))
