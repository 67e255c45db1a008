"""Circulant matrices: cyclic convolutions, diagonal in the Fourier basis.

::

    a d c b
    b a d c
    c b a d        n numbers, products O(n log n)
    d c b a
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Size, Tensor

from structured._core.checks import check_pivots
from structured._core.matrix import Scalar, StructuredMatrix, at_least_float32, largest
from structured._core.numbers import above_rounding, add_to_first
from structured._transforms.autocorrelation import autocorrelation
from structured._transforms.fft import fft, irfft, rfft
from structured._transforms.windows import windows


def _power(F: Tensor) -> Tensor:
    """``|F|^2``."""
    return F.real.square() + F.imag.square()


def _dense_is_faster(n: int, m: int, dtype: torch.dtype) -> bool:
    """Whether to write the matrix out for ``m`` columns: where it is small, or in 16 bits.

    Measured; an FFT raises 16 bits to 32, which matrix units need not.
    """
    return n <= 64 or (dtype.itemsize <= 2 and n <= min(2048, 4 * m))


class Circulant(StructuredMatrix):
    """``C_ij = c_{(i - j) mod n}``. Stores n numbers; ``A X`` costs n log n a column.

    The only built-in structure besides the diagonal ones whose members all commute.
    """

    c: Tensor  # [..., n], the first column

    dimensions = ("n",)

    closed_under_transpose = True

    @classmethod
    def zeros(cls, n: int, *, batch_shape: Sequence[int] = (), **opts: Any) -> Self:
        """The zero matrix of size ``n``."""
        return cls(torch.zeros(*batch_shape, n, **opts))

    def to_dense(self) -> Tensor:
        """Every wrapped diagonal filled with its number."""
        backwards, n = self.c.flip(-1), self.n
        twice = torch.cat([backwards, backwards[..., : n - 1]], -1)
        # row i from the end is a window that begins i places later
        return windows(twice, n).flip(-2) if n else self.c[..., None] * self.c[..., None, :]

    @property
    def shape(self) -> Size:
        """``[..., n, n]``."""
        return Size((*self.c.shape, self.c.shape[-1]))

    @property
    def mT(self) -> Self:
        """``c_k`` becomes ``c_{-k}``."""
        return self._build([torch.cat([self.c[..., :1], self.c[..., 1:].flip(-1)], -1)])

    @property
    def _spectrum(self) -> Tensor:
        """The first ``n // 2 + 1`` eigenvalues; the others are their conjugates."""
        return rfft(self.c, self.n)

    def _with_spectrum(self, F: Tensor) -> Self:
        """The member with the given eigenvalues."""
        return self._build([irfft(F, self.n).to(self.dtype)])

    def matmul(self, other: Self) -> Self:
        """Cyclic convolution."""
        return self._with_spectrum(self._spectrum * other._spectrum)

    def apply(self, X: Tensor) -> Tensor:
        """Cyclic convolution of every column of ``X [..., n, m]``."""
        n, m = X.shape[-2:]
        if _dense_is_faster(n, m, X.dtype):
            return self.to_dense() @ X
        F = self._spectrum[..., None, :]
        return irfft(F * rfft(X.mT, self.n), self.n).to(X.dtype).mT

    def apply_transpose(self, X: Tensor) -> Tensor:
        """Cyclic correlation of every column of ``X [..., n, m]``."""
        n, m = X.shape[-2:]
        if _dense_is_faster(n, m, X.dtype):
            return self.to_dense().mT @ X
        F = self._spectrum[..., None, :]
        return irfft(F.conj() * rfft(X.mT, self.n), self.n).to(X.dtype).mT

    def orthogonal_project(self, M: Tensor) -> Self:
        """Means of the wrapped diagonals of ``M [..., n, n]``."""
        # Each row written twice, then read back one place longer, slides one place further.
        n, rows = M.shape[-1], M.to(at_least_float32(M.dtype))
        twice = torch.nn.functional.pad(torch.cat([rows, rows], -1).flatten(-2), (0, n))
        means = twice.unflatten(-1, (n, 2 * n + 1))[..., :n].sum(-2) / max(n, 1)
        return self._build([means.to(M.dtype)]).mT

    def project(self, S: Tensor) -> Self:
        """Means of the wrapped diagonals of ``S [..., n, n]``."""
        return self.orthogonal_project(S)

    def project_gram(self, X: Tensor) -> Self:
        """Cyclic autocorrelation of the columns of ``X [..., n, m]``, n log n a column."""
        sums = autocorrelation(X, cyclic=True)
        return self._build([(sums / max(self.n, 1)).to(self.dtype)])

    def gram(self) -> Self:
        """``C^T C``, which is circulant."""
        return self._with_spectrum(_power(self._spectrum))

    def exp(self) -> Self:
        """The exponential of the spectrum."""
        return self._with_spectrum(self._spectrum.exp())

    def diagonal(self) -> Tensor:
        """``c_0``, n times."""
        return self.c[..., :1].expand(self.c.shape).clone()

    def trace(self) -> Tensor:
        """``n c_0``."""
        return self.n * self.c[..., :1].sum(-1)

    def add_scaled_identity(self, alpha: Scalar) -> Self:
        """Add to ``c_0``."""
        return self._build([add_to_first(self.c, alpha)])

    def solve(self, X: Tensor) -> Tensor:
        """Divide the spectra.

        Raises:
            RuntimeError: If ``A`` is singular to working precision, for the FFT rounds zeros
                (``torch.linalg.LinAlgError``).
        """
        F = self._pivots()[..., None, :]
        return irfft(rfft(X.mT, self.n) / F, self.n).to(X.dtype).mT

    def inverse(self) -> Self:
        """One over the spectrum.

        Raises:
            RuntimeError: As :meth:`solve`.
        """
        return self._with_spectrum(1 / self._pivots())

    def _pivots(self) -> Tensor:
        """The spectrum, if there are no zeros in it."""
        F = self._spectrum
        if self.n:
            check_pivots(above_rounding(F.abs()))
        return F

    def logdet(self) -> Tensor:
        """Sum of ``log |F c|``, the eigenvalues."""
        return fft(self.c).abs().log().sum(-1).to(self.c.dtype)

    def max_abs(self) -> Tensor:
        """Largest absolute entry."""
        return largest(self.c, self.c.ndim - 1)

    def spectral_norm(self) -> Tensor:
        """Largest absolute value in the spectrum."""
        return self._spectrum.abs().amax(-1).to(self.dtype)

    def frobenius_norm(self) -> Tensor:
        """``sqrt(n) |c|``."""
        return math.sqrt(self.n) * torch.linalg.vector_norm(self.c, dim=-1)
