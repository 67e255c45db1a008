"""Group algebras: convolutions over a finite group, circulant matrices being those of one cycle.

::

    a b c d        number the rows and the columns by the elements of the group:
    b a d c        A_ij is the number of i j^-1
    c d a b
    d c b a        n numbers; products O(n log n) over products of cycles, else O(n^2)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Size, Tensor

from structured._core.checks import check_pivots
from structured._core.groups import check_table, cycles, dihedral
from structured._core.matrix import (
    Scalar,
    StructuredMatrix,
    at_least_float32,
    largest,
    static,
)
from structured._core.numbers import above_rounding, add_to_first
from structured._core.spec import words

_DENSE = 64  # rows; up to here the matrix is written out, as for circulant matrices

words("dihedral")


class GroupAlgebra(StructuredMatrix):
    """``A_ij = c_{i j^-1}`` for the elements ``i, j`` of a finite group; element 0 is neutral.

    Stores n numbers. ``A X`` costs n log n a column for a product of cycles, by FFTs along each
    (``group_algebra(k)``, a torus of n / k by k places, is the two-dimensional circulant), and n^2
    for any other group. Matrices that commute with the symmetries of a domain are of this kind.

    Source: Serre, *Linear Representations of Finite Groups* (Springer, 1977), chapter 6.
    """

    c: Tensor  # [..., n], the first column
    group: tuple[int, ...] | str | Tensor = static()  # sizes of cycles, a name, or products [n, n]

    dimensions = ("n",)

    def __post_init__(self) -> None:
        super().__post_init__()
        group, n = self.group, self.n
        if not isinstance(group, str):
            self._check_core("c", math.prod(group) if isinstance(group, tuple) else len(group))
        elif n % 2:
            raise ValueError(f"group_algebra({group}): expected an even size, got {n}")

    closed_under_transpose = True

    @classmethod
    def zeros(
        cls,
        n: int,
        *group: int | str | Tensor,
        batch_shape: Sequence[int] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """The zero matrix of size ``n``.

        Args:
            n: The size of the group.
            group: Sizes of cycles, the first one left out (none: one cycle, circulant matrices);
                or ``"dihedral"``, the symmetries of a polygon with n / 2 corners; or the products
                ``i j`` of elements as integers ``[n, n]``.
            batch_shape: Leading dimensions.
            dtype: As of :func:`torch.zeros`.
            device: As of :func:`torch.zeros`.

        Raises:
            ValueError: If the sizes do not divide ``n``, the name is unknown, or the products are
                not those of a group whose element 0 is neutral.
        """
        c = torch.zeros(*batch_shape, n, dtype=dtype, device=device)
        if len(group) == 1 and isinstance(group[0], Tensor):
            check_table(group[0], n)
            return cls(c, group[0].to(c.device, torch.int64))
        if group == ("dihedral",):
            return cls(c, "dihedral")
        sizes = tuple(k for k in group if isinstance(k, int) and not isinstance(k, bool) and k > 0)
        if len(sizes) != len(group) or n % math.prod(sizes):
            raise ValueError(
                f"group_algebra: expected 'dihedral', products [{n}, {n}] or sizes of cycles whose "
                f"product divides {n}, got {group}"
            )
        return cls(c, (n // math.prod(sizes), *sizes))

    def _products(self) -> Tensor:
        """``i j`` for all elements, ``[n, n]``."""
        if isinstance(self.group, Tensor):
            return self.group
        if isinstance(self.group, tuple):
            return cycles(self.group, self.device)
        return dihedral(self.n, self.device)

    def _inverses(self) -> Tensor:
        """``i^-1`` for all elements, ``[n]``."""
        n = self.n
        if isinstance(self.group, Tensor):  # where the product is the least of its row, 0
            return self.group.argmin(-1) if n else self.group.flatten()
        ramp = torch.arange(n, device=self.device)
        if isinstance(self.group, tuple):
            grid = ramp.reshape(self.group) if n else ramp
            for dim, size in enumerate(self.group if n else ()):
                grid = grid.index_select(dim, (-ramp[:size]) % size)
            return grid.flatten()
        m = n // 2
        return torch.cat([(-ramp[:m]) % max(m, 1), ramp[m:]])  # a reflection is its own

    def to_dense(self) -> Tensor:
        """Row i and column j with the number of ``i j^-1``."""
        return self.c[..., self._products()[:, self._inverses()]]

    @property
    def shape(self) -> Size:
        """``[..., n, n]``."""
        return Size((*self.c.shape, self.c.shape[-1]))

    @property
    def mT(self) -> Self:
        """``c_i`` becomes ``c_{i^-1}``."""
        return self._build([self.c[..., self._inverses()]])

    # Products of cycles are diagonal in the Fourier basis ----------------------------------------

    @property
    def _by_fft(self) -> bool:
        return isinstance(self.group, tuple) and self.n > _DENSE

    @property
    def _cycle_sizes(self) -> tuple[int, ...]:
        assert isinstance(self.group, tuple), f"expected cycles, got {self.group}"
        return self.group

    def _transform(self, rows: Tensor) -> Tensor:
        """The half spectrum of ``rows [..., n]``, a dimension for each cycle."""
        sizes = self._cycle_sizes
        grid = rows.to(at_least_float32(rows.dtype)).unflatten(-1, sizes)
        return torch.fft.rfftn(grid, dim=tuple(range(-len(sizes), 0)))

    def _back(self, F: Tensor) -> Tensor:
        """Inverse of :meth:`_transform`, in the dtype of the member."""
        sizes = self._cycle_sizes
        grid = torch.fft.irfftn(F, s=sizes, dim=tuple(range(-len(sizes), 0)))
        return grid.flatten(-len(sizes)).to(self.dtype)

    def _filtered(self, F: Tensor, X: Tensor) -> Tensor:
        """``X [..., n, m]`` with the spectrum of its columns multiplied by ``F``."""
        if not X.numel():  # which torch.fft refuses
            return self.to_dense() @ X
        return self._back(F.unsqueeze(-1 - len(self._cycle_sizes)) * self._transform(X.mT)).mT

    def matmul(self, other: Self) -> Self:
        """Convolution over the group: the first column of the product."""
        return self._build([self.apply(other.c[..., None])[..., 0]])

    def apply(self, X: Tensor) -> Tensor:
        """Convolution of every column of ``X [..., n, m]``."""
        if not self._by_fft or not self.c.numel():
            return self.to_dense() @ X
        return self._filtered(self._transform(self.c), X)

    def apply_transpose(self, X: Tensor) -> Tensor:
        """Correlation of every column of ``X [..., n, m]``."""
        if not self._by_fft or not self.c.numel():
            return self.to_dense().mT @ X
        return self._filtered(self._transform(self.c).conj(), X)

    def orthogonal_project(self, M: Tensor) -> Self:
        """Means of the n places ``(i j, j)`` of each element i, of ``M [..., n, n]``."""
        n = self.n
        places = self._products() * n + torch.arange(n, device=self.device)
        found = M.flatten(-2)[..., places].to(at_least_float32(M.dtype))
        return self._build([(found.sum(-1) / max(n, 1)).to(M.dtype)])

    def project(self, S: Tensor) -> Self:
        """As :meth:`orthogonal_project`."""
        return self.orthogonal_project(S)

    def project_gram(self, X: Tensor) -> Self:
        """Autocorrelation of the columns of ``X [..., n, m]``."""
        if not self._by_fft or not X.numel():
            return super().project_gram(X)
        F = self._transform(X.mT)
        power = (F.real.square() + F.imag.square()).sum(-1 - len(self._cycle_sizes))
        return self._build([self._back(torch.complex(power, torch.zeros_like(power)) / self.n)])

    def gram(self) -> Self:
        """``A^T A``, which is in the algebra."""
        return self.mT.matmul(self)

    def solve(self, X: Tensor) -> Tensor:
        """Divide the spectra of products of cycles; else solve, n^3.

        Raises:
            RuntimeError: If ``A`` is singular (``torch.linalg.LinAlgError``); of products of cycles
                also to working precision, for an FFT rounds zeros.
        """
        if not self._by_fft or not self.c.numel():
            return super().solve(X)
        F = self._transform(self.c)
        check_pivots(above_rounding(F.abs().flatten(-len(self._cycle_sizes))))
        return self._filtered(1 / F, X)

    def solve_member(self, other: Self) -> Self:
        """Of the first column, which is all there is."""
        return self._build([self.solve(other.c[..., None])[..., 0]])

    def inverse(self) -> Self:
        """By one solve."""
        return self.solve_member(self.zeros_like().add_scaled_identity(1.0))

    def exp(self) -> Self:
        """The exponential of the spectrum, or by products of n^2."""
        if not self._by_fft or not self.c.numel():
            return self._exp_by_products()
        return self._build([self._back(self._transform(self.c).exp())])

    def diagonal(self) -> Tensor:
        """``c_0``, n times."""
        return self.c[..., :1].expand(self.c.shape).clone()

    def trace(self) -> Tensor:
        """``n c_0``."""
        return self.n * self.c[..., :1].sum(-1)

    def add_scaled_identity(self, alpha: Scalar) -> Self:
        """Add to ``c_0``."""
        return self._build([add_to_first(self.c, alpha)])

    def logdet(self) -> Tensor:
        """Sum of the logarithms of the spectrum of products of cycles; else n^3."""
        if not self._by_fft or not self.c.numel():
            return super().logdet()
        sizes = self._cycle_sizes
        grid = self.c.to(at_least_float32(self.dtype)).unflatten(-1, sizes)
        dims = tuple(range(-len(sizes), 0))
        return torch.fft.fftn(grid, dim=dims).abs().log().sum(dims).to(self.dtype)

    def max_abs(self) -> Tensor:
        """Largest absolute entry."""
        return largest(self.c, self.c.ndim - 1)

    def spectral_norm(self) -> Tensor:
        """Largest absolute value in the spectrum of products of cycles; else n^3."""
        if not self._by_fft or not self.c.numel():
            return super().spectral_norm()
        F = self._transform(self.c).abs().flatten(-len(self._cycle_sizes))
        return F.amax(-1).to(self.dtype)

    def frobenius_norm(self) -> Tensor:
        """``sqrt(n) |c|``."""
        return math.sqrt(self.n) * torch.linalg.vector_norm(self.c, dim=-1)
