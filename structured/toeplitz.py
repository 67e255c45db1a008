"""Triangular Toeplitz matrices: one number per diagonal, products by FFT.

::

    a . . .        a b c d
    b a . .        . a b c
    c b a .        . . a b        n numbers, products O(n log n)
    d c b a        . . . a
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Size, Tensor

from structured._core.checks import check_pivots
from structured._core.dispatch import symmetric_product
from structured._core.matrix import Scalar, StructuredMatrix, at_least_float32, largest
from structured._core.numbers import add_to_first
from structured._transforms.autocorrelation import autocorrelation, diagonal_sums
from structured._transforms.fft import fft_length, irfft, rfft, smooth_length
from structured._transforms.windows import windows

_SUBSTITUTED = 512  # rows; below, a triangular solve is faster than a convolution (measured)


def _convolve(t: Tensor, X: Tensor, *, adjoint: bool = False) -> Tensor:
    """``sum_k t_k X_{i-k}`` (adjoint: ``sum_k t_k X_{i+k}``) along dimension -1."""
    n = t.shape[-1]
    length = fft_length(n)
    F = rfft(t, length)
    Y = (F.conj() if adjoint else F) * rfft(X, length)
    return irfft(Y, length)[..., :n].to(X.dtype)


def _dense_is_faster(n: int, m: int, dtype: torch.dtype) -> bool:
    """Whether matrix products beat FFTs for ``m`` columns; beyond n = 2048 they never do.

    Measured (``benchmarks.ops``). An FFT raises 16 bits to 32, which matrix units need not.
    """
    most, columns = (1024, 2 * m) if dtype.itemsize > 2 else (2048, 8 * m)
    return n <= 128 or n <= min(512, 32 * m) or n <= min(most, columns)


def _gram_is_faster(n: int, m: int, dtype: torch.dtype) -> bool:
    """The same for ``X X^T``, where the FFT has no way back."""
    return n <= 128 or (dtype.itemsize <= 2 and n <= min(2048, 2 * m))


def _block_size(n: int, dtype: torch.dtype) -> int:
    """Rows of a block: many small products skip more zeros, one large product runs faster."""
    blocks = 1 if n < 512 or dtype.itemsize <= 2 else n // 128
    return max(-(-n // blocks), 1)


def _last_rows(t: Tensor, count: int) -> Tensor:
    """The last ``count`` rows of the lower Toeplitz matrix of ``t [..., n]``, ``[..., count, n]``.

    Backwards: row i from the end is a window of ``t`` that begins i places later.
    """
    padded = torch.nn.functional.pad(t.flip(-1), (0, count - 1))
    return windows(padded, t.shape[-1]).flip(-2)


def _first_rows(t: Tensor, count: int) -> Tensor:
    """The first ``count`` rows of the upper Toeplitz matrix of ``t``, likewise."""
    padded = torch.nn.functional.pad(t, (count - 1, 0))
    return windows(padded, t.shape[-1]).flip(-2)


def _multiply(t: Tensor, X: Tensor, *, adjoint: bool = False) -> Tensor:
    """``T X`` (adjoint: ``T^T X``) for the lower Toeplitz matrix of ``t`` and ``X [..., n, m]``."""
    n, m = X.shape[-2:]
    if not _dense_is_faster(n, m, X.dtype):
        return _convolve(t[..., None, :], X.mT, adjoint=adjoint).mT
    size = _block_size(n, X.dtype)
    if size >= n:
        T = lower(t)
        return (T.mT if adjoint else T) @ X
    if adjoint:  # each block of rows is the beginning of the last one
        rows, starts = _first_rows(t, size), range(0, n, size)
        return torch.cat([rows[..., : n - i, : n - i] @ X[..., i:, :] for i in starts], -2)
    rows = _last_rows(t, size)
    # Each block of rows is the end of the last one, and meets the rows of X so far.
    stops = range(n % size or size, n + 1, size)
    first = rows[..., -stops[0] :, -stops[0] :] @ X[..., : stops[0], :]
    return torch.cat([first, *(rows[..., -stop:] @ X[..., :stop, :] for stop in stops[1:])], -2)


def lower(t: Tensor) -> Tensor:
    """``T_ij = t_{i-j}`` for ``i >= j``, ``[..., n, n]`` from ``t [..., n]``."""
    return _last_rows(t, t.shape[-1]) if t.shape[-1] else t[..., None] * t[..., None, :]


def _substitute(t: Tensor, Y: Tensor) -> Tensor:
    """``T^{-1} Y`` for the lower Toeplitz matrix of ``t`` and ``Y [..., n, m]``.

    Forward substitution, where what the first half adds to the second is one convolution. The
    residual is that of the substitution up to the rounding of an FFT. Newton's iteration for the
    inverse series loses all digits of an ill-conditioned member: each step squares its errors.
    """
    n = t.shape[-1]
    if n <= _SUBSTITUTED:
        return torch.linalg.solve_triangular(lower(t), Y, upper=False)
    h = n // 2
    first = _substitute(t[..., :h], Y[..., :h, :])
    length = smooth_length(n)  # what wraps around falls into the first half
    product = rfft(t, length)[..., None, :] * rfft(first.mT, length)
    rest = Y[..., h:, :] - irfft(product, length)[..., h:n].mT
    return torch.cat([first, _substitute(t[..., : n - h], rest)], -2)


def _cumulative(t: Tensor) -> Tensor:
    """Sums of the first 1 to n numbers, in float32 at least."""
    return t.cumsum(-1, dtype=at_least_float32(t.dtype)).to(t.dtype)


def _counts(t: Tensor) -> Tensor:
    """``[n, n - 1, ..., 1]``, the lengths of the diagonals, in float32 at least."""
    return torch.arange(t.shape[-1], 0, -1, dtype=at_least_float32(t.dtype), device=t.device)


def _means(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """Means of the diagonals from their sums ``[..., n]``: ``P``."""
    return (sums / _counts(sums)).to(dtype)


def _double_off_diagonal(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """Means of the diagonals from their sums ``[..., n]``, all but the main one doubled: ``Pi``."""
    weights = 2 / _counts(sums)
    weights[:1] /= 2
    return (sums * weights).to(dtype)


def _gram_sums(X: Tensor) -> Tensor:
    """Sums of the n lower diagonals of ``X X^T``, in float32 at least."""
    n, m = X.shape[-2:]
    dense = _gram_is_faster(n, m, X.dtype)
    return diagonal_sums(symmetric_product(X)) if dense else autocorrelation(X)


class _TriangularToeplitz(StructuredMatrix):
    """What the lower and the upper form share: one algebra of power series, ``sum_k t_k Z^k``."""

    t: Tensor  # [..., n], t_k on the k-th diagonal

    dimensions = ("n",)

    @classmethod
    def zeros(cls, n: int, *, batch_shape: Sequence[int] = (), **opts: Any) -> Self:
        """The zero matrix of size ``n``."""
        return cls(torch.zeros(*batch_shape, n, **opts))

    @property
    def shape(self) -> Size:
        """``[..., n, n]``."""
        return Size((*self.t.shape, self.t.shape[-1]))

    def matmul(self, other: Self) -> Self:
        """Product of power series, O(n log n)."""
        return self._build([_multiply(self.t, other.t[..., None])[..., 0]])

    def project(self, S: Tensor) -> Self:
        """Means of the diagonals of ``S [..., n, n]``, twice off the main one."""
        return self._build([_double_off_diagonal(diagonal_sums(S), S.dtype)])

    def project_gram(self, X: Tensor) -> Self:
        """Autocorrelation of the columns of ``X [..., n, m]``, O(n log n) a column."""
        return self._build([_double_off_diagonal(_gram_sums(X), X.dtype)])

    def orthogonal_project_gram(self, X: Tensor) -> Self:
        """Means of the diagonals of ``X X^T``, from the same sums."""
        return self._build([_means(_gram_sums(X), X.dtype)])

    def gram(self) -> Self:
        """``Pi(T^T T)``: the k-th diagonal of the product sums to ``sum_p t_p (n-p-k) t_{p+k}``."""
        t = self.t.to(at_least_float32(self.t.dtype))
        sums = _multiply(t, (_counts(t) * t)[..., None], adjoint=True)[..., 0]
        return self._build([_double_off_diagonal(sums, self.t.dtype)])

    def inverse(self) -> Self:
        """The inverse power series, by one solve."""
        return self.solve_member(self.zeros_like().add_scaled_identity(1.0))

    def exp(self) -> Self:
        """By products, n log n each."""
        return self._exp_by_products()

    def diagonal(self) -> Tensor:
        """``t_0``, n times."""
        return self.t[..., :1].expand(self.t.shape).clone()

    def trace(self) -> Tensor:
        """``n t_0``."""
        return self.n * self.t[..., :1].sum(-1)

    def add_scaled_identity(self, alpha: Scalar) -> Self:
        """Add to ``t_0``."""
        return self._build([add_to_first(self.t, alpha)])

    def logdet(self) -> Tensor:
        """``n log |t_0|``."""
        return self.n * self.t[..., :1].abs().log().sum(-1)

    def max_abs(self) -> Tensor:
        """Largest absolute entry."""
        return largest(self.t, self.t.ndim - 1)

    def frobenius_norm(self) -> Tensor:
        """Square root of ``sum_k (n - k) t_k^2``."""
        scaled = _counts(self.t).sqrt() * self.t
        return torch.linalg.vector_norm(scaled, dim=-1).to(self.t.dtype)


class LowerToeplitz(_TriangularToeplitz):
    """``T_ij = t_{i-j}`` for ``i >= j``. Stores n numbers; ``A X`` costs n log n a column."""

    def to_dense(self) -> Tensor:
        """Every diagonal filled with its number."""
        return lower(self.t)

    @property
    def mT(self) -> UpperToeplitz:
        """The upper form of the same numbers."""
        return UpperToeplitz(self.t)

    def apply(self, X: Tensor) -> Tensor:
        """Causal convolution of every column of ``X [..., n, m]``."""
        return _multiply(self.t, X)

    def apply_transpose(self, X: Tensor) -> Tensor:
        """Anticausal convolution of every column of ``X [..., n, m]``."""
        return _multiply(self.t, X, adjoint=True)

    def orthogonal_project(self, M: Tensor) -> Self:
        """Means of the lower diagonals of ``M [..., n, n]``."""
        return self._build([_means(diagonal_sums(M), M.dtype)])

    def solve(self, X: Tensor) -> Tensor:
        """Forward substitution, by halves; O(n log^2 n) a column.

        Raises:
            RuntimeError: If ``A`` is singular (``torch.linalg.LinAlgError``).
        """
        check_pivots(self.t[..., :1])
        wide = at_least_float32(X.dtype)
        return _substitute(self.t.to(wide), X.to(wide)).to(X.dtype)

    def squared_rows(self) -> Tensor:
        """Sums of the first squares of ``t``: one more in each row."""
        return _cumulative(self.t.square())

    def solve_member(self, other: Self) -> Self:
        """Of the first column, which is all there is."""
        return self._build([self.solve(other.t[..., None])[..., 0]])


class UpperToeplitz(_TriangularToeplitz):
    """``T_ij = t_{j-i}`` for ``j >= i``. Stores n numbers; ``A X`` costs n log n a column."""

    def to_dense(self) -> Tensor:
        """Every diagonal filled with its number."""
        return self.mT.to_dense().mT

    @property
    def mT(self) -> LowerToeplitz:
        """The lower form of the same numbers."""
        return LowerToeplitz(self.t)

    def apply(self, X: Tensor) -> Tensor:
        """Anticausal convolution of every column of ``X [..., n, m]``."""
        return self.mT.apply_transpose(X)

    def apply_transpose(self, X: Tensor) -> Tensor:
        """Causal convolution of every column of ``X [..., n, m]``."""
        return self.mT.apply(X)

    def orthogonal_project(self, M: Tensor) -> Self:
        """Means of the upper diagonals of ``M [..., n, n]``."""
        return self._build([self.mT.orthogonal_project(M.mT).t])

    def solve(self, X: Tensor) -> Tensor:
        """Back substitution, by halves; O(n log^2 n) a column.

        Raises:
            RuntimeError: If ``A`` is singular (``torch.linalg.LinAlgError``).
        """
        return self.mT.solve(X.flip(-2)).flip(-2)  # the same matrix, read from the other end

    def squared_rows(self) -> Tensor:
        """Sums of the first squares of ``t``: one less in each row."""
        return _cumulative(self.t.square()).flip(-1)

    def solve_member(self, other: Self) -> Self:
        """``A^{-1} B = (A^{-T} B^T)^T``, for all commute."""
        return self._build([self.mT.solve_member(other.mT).t])
