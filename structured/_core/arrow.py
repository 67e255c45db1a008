"""Symmetric matrices with full rows and columns at both ends, and a diagonal between them."""

from __future__ import annotations

import torch
from torch import Size, Tensor

from structured._core.checks import check_arguments, check_pivots
from structured._core.lazy import Combined
from structured._core.member import Scaled
from structured._core.numbers import at_least_float32, solve_dense
from structured._core.stored import static
from structured._products.in_place import add_product_, holds_product, plain, plus_product


def at_ends(t: Tensor, first: int, last: int, dim: int = -2) -> Tensor:
    """The first and the last places along a dimension: ``J^T t``, or ``t J`` for ``dim = -1``."""
    return torch.cat([t.narrow(dim, 0, first), t.narrow(dim, t.shape[dim] - last, last)], dim)


class Arrow(Scaled, Combined):
    """A symmetric matrix with full rows and columns in front and at the end, else diagonal.

    What ``A A^T`` is for a hierarchical ``A``. No structure: products fill the middle. Sums and
    products are operators, multiples are of the same kind.
    """

    d: Tensor  # [..., n], zero at the full rows
    W: Tensor  # [..., k, n], the full rows
    first: int = static()  # how many of them are in front

    @property
    def shape(self) -> Size:
        """``[..., n, n]``."""
        n = self.d.shape[-1]
        return Size((*self.d.shape[:-1], n, n))

    @property
    def mT(self) -> Arrow:
        """Symmetric: its own transpose."""
        return self

    def apply(self, X: Tensor) -> Tensor:
        """Rows by one product of width k, columns by another."""
        return self._apply(X, own=False)

    def apply_overwriting(self, X: Tensor) -> Tensor:
        """As :meth:`apply`, the rows that are not full in place."""
        return self._apply(X, own=holds_product(X, self.batch_shape))

    def _apply(self, X: Tensor, *, own: bool) -> Tensor:
        k1, k = self.first, self.W.shape[-2]
        return self._write(X, self.W @ X, at_ends(X, k1, k - k1), own=own)

    rows_apart = True

    def apply_rows(self, X: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Without joining the parts, if the second holds full rows alone."""
        k1, (k, n), s = self.first, self.W.shape[-2:], X.shape[-2]
        if s < n - k + k1:  # rows that are not full come second
            return super().apply_rows(X, x)
        Z = plus_product(self.W[..., :s] @ X, self.W[..., s:], x)
        ends = torch.cat([X[..., :k1, :], X[..., n - k + k1 :, :], x], -2)
        return self._write(X, Z, ends, own=False), Z[..., k - n + s :, :]

    def _write(self, X: Tensor, Z: Tensor, ends: Tensor, *, own: bool) -> Tensor:
        """The first rows of the product, as many as ``X`` has, from the full ones ``Z``."""
        k1, (k, n), s = self.first, self.W.shape[-2:], X.shape[-2]
        if not plain(X, Z, ends, self.d, self.W):
            middle = self.d[..., k1 : n - k + k1, None] * X.narrow(-2, k1, n - k)
            middle = middle + self.W.narrow(-1, k1, n - k).mT @ ends
            return torch.cat([Z[..., :k1, :], middle, Z[..., k1 : k - n + s, :]], -2)
        d = self.d[..., :s, None]
        Y = X.mul_(d) if own else d * X
        add_product_(Y.narrow(-2, k1, n - k), self.W.narrow(-1, k1, n - k).mT, ends)
        Y[..., :k1, :] = Z[..., :k1, :]
        Y[..., n - k + k1 :, :] = Z[..., k1 : k - n + s, :]
        return Y

    def apply_transpose(self, X: Tensor) -> Tensor:
        """The same as :meth:`apply`."""
        return self.apply(X)

    def _blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        """The diagonal, the full rows beside it, and the corner where they meet their columns."""
        k1, (k, n) = self.first, self.W.shape[-2:]
        middle = self.W.narrow(-1, k1, n - k)
        return self.d[..., k1 : n - k + k1], middle, at_ends(self.W, k1, k - k1, -1)

    def solve(self, X: Tensor) -> Tensor:
        """The full rows by the Schur complement of the diagonal, then the others.

        Raises:
            RuntimeError: If ``A`` is singular (``torch.linalg.LinAlgError``).
        """
        k1, (k, n) = self.first, self.W.shape[-2:]
        wide = at_least_float32(X.dtype)
        d, W, corner = (t.to(wide) for t in self._blocks())
        check_pivots(d)
        Z, x, y = W / d[..., None, :], X.to(wide).narrow(-2, k1, n - k), at_ends(X, k1, k - k1)
        y = solve_dense(corner - Z @ W.mT, y.to(wide) - Z @ x)
        x = (x - W.mT @ y) / d[..., None]
        return torch.cat([y[..., :k1, :], x, y[..., k1:, :]], -2).to(X.dtype)

    def logdet(self) -> Tensor:
        """That of the Schur complement, and the sum of ``log |d|``."""
        d, W, corner = (t.to(at_least_float32(self.dtype)) for t in self._blocks())
        complement = corner - (W / d[..., None, :]) @ W.mT
        rest = torch.linalg.slogdet(complement).logabsdet
        return (rest + d.abs().log().sum(-1)).to(self.dtype)

    def diagonal(self) -> Tensor:
        """``d``, and that of the corner at both ends."""
        d, _, corner = self._blocks()
        ends = corner.diagonal(dim1=-2, dim2=-1)
        return torch.cat([ends[..., : self.first], d, ends[..., self.first :]], -1)

    def to_dense(self) -> Tensor:
        """``A I``."""
        eye = torch.eye(self.n, dtype=self.dtype, device=self.device)
        return self.apply(eye)


check_arguments(Arrow, ("apply", "apply_transpose", "solve"))
