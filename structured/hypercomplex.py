"""Complex numbers or quaternions on the diagonal, as real blocks: scaled rotations.

::

    a -b . .
    b  a . .        n numbers, products O(n)
    . . c -d
    . . d  c
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Size, Tensor

from structured._core.checks import check_pivots
from structured._core.dispatch import sums_of_squares
from structured._core.matrix import Scalar, StructuredMatrix, at_least_float32, largest
from structured._core.numbers import lengths
from structured._core.spec import Structure, composition
from structured.block_diagonal import BlockDiagonal

# The number that stands in each place of a block, and its sign: products from the left.
_PLACES = {
    2: (((0, 1), (1, 0)), ((1, -1), (1, 1))),
    4: (
        ((0, 1, 2, 3), (1, 0, 3, 2), (2, 3, 0, 1), (3, 2, 1, 0)),
        ((1, -1, -1, -1), (1, 1, -1, 1), (1, 1, 1, -1), (1, -1, 1, 1)),
    ),
}


def _sizes(d: Any) -> None:
    if d not in _PLACES or isinstance(d, bool):
        raise ValueError(f"hypercomplex(d): expected d = 2 or 4, got {d!r}")


class Hypercomplex(StructuredMatrix):
    """Blocks of size ``d`` that multiply by one complex number (d = 2) or quaternion (d = 4) each.

    Stores n numbers; ``A X`` costs d n a column. A block is a multiple of a rotation, as of the
    pairs of coordinates of rotary embeddings. ``kron(A, complex_numbers, 2)`` and
    ``kron(A, quaternions, 4)`` are matrices of such numbers, of any structure.
    """

    q: Tensor  # [..., n / d, d], real part first

    dimensions = ("count d",)

    closed_under_transpose = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _sizes(self.q.shape[-1])

    @classmethod
    def zeros(cls, n: int, d: int, *, batch_shape: Sequence[int] = (), **opts: Any) -> Self:
        """The zero matrix of size ``n`` with blocks of size ``d``.

        Raises:
            ValueError: If ``d`` is neither 2 nor 4, or does not divide ``n``.
        """
        _sizes(d)
        if n % d:
            raise ValueError(f"hypercomplex({d}): expected a size divisible by {d}, got {n}")
        return cls(torch.zeros(*batch_shape, n // d, d, **opts))

    def to_dense(self) -> Tensor:
        """Every number as its block, on the diagonal of zeros."""
        return self._as_blocks().to_dense()

    @property
    def shape(self) -> Size:
        """``[..., n, n]``."""
        n = self.q.shape[-2:].numel()
        return Size((*self.q.shape[:-2], n, n))

    def _as_blocks(self) -> BlockDiagonal:
        places, signs = self._places()
        blocks = self.q[..., places] * signs
        return BlockDiagonal(blocks, self.q.new_zeros(*self.batch_shape, 0, 0))

    def _places(self) -> tuple[Tensor, Tensor]:
        places, signs = _PLACES[self.q.shape[-1]]
        made = torch.tensor(places, device=self.device), torch.tensor(signs, device=self.device)
        return made[0], made[1].to(self.dtype)

    def _conjugate(self) -> Tensor:
        return torch.cat([self.q[..., :1], -self.q[..., 1:]], -1)

    @property
    def mT(self) -> Self:
        """The conjugate numbers."""
        return self._build([self._conjugate()])

    def matmul(self, other: Self) -> Self:
        """Products of numbers."""
        return self._build([(self._as_blocks().blocks @ other.q[..., None])[..., 0]])

    def apply(self, X: Tensor) -> Tensor:
        """Block by block, d n a column."""
        return self._as_blocks().apply(X)

    def apply_transpose(self, X: Tensor) -> Tensor:
        """Block by block, d n a column."""
        return self._as_blocks().apply_transpose(X)

    def orthogonal_project(self, M: Tensor) -> Self:
        """Means, with their signs, over the d places of each number in the diagonal blocks."""
        places, signs = self._places()
        blocks = self._as_blocks().orthogonal_project(M).blocks * signs
        # each row of a block is a permutation of the numbers, undone here
        found = blocks.gather(-1, places.argsort(-1).expand(blocks.shape))
        return self._build([found.mean(-2, dtype=at_least_float32(M.dtype)).to(M.dtype)])

    def project(self, S: Tensor) -> Self:
        """As :meth:`orthogonal_project`: a real number for each block."""
        return self.orthogonal_project(S)

    def project_gram(self, X: Tensor) -> Self:
        """Means of the sums of squares over the d rows of each block."""
        squares = sums_of_squares(X).unflatten(-1, self.q.shape[-2:])
        return self._real(squares.mean(-1, keepdim=True, dtype=at_least_float32(X.dtype)))

    def _real(self, first: Tensor) -> Self:
        """The member with real numbers ``[..., n / d, 1]``."""
        rest = (0, self.q.shape[-1] - 1)
        return self._build([torch.nn.functional.pad(first.to(self.dtype), rest)])

    def gram(self) -> Self:
        """``|q|^2``."""
        return self._real(self.q.square().sum(-1, keepdim=True))

    def diagonal(self) -> Tensor:
        """The real parts, d times each."""
        return self.q[..., :1].expand(self.q.shape).flatten(-2).clone()

    def squared_rows(self) -> Tensor:
        """``|q|^2``, d times each."""
        return self.gram().diagonal()

    def add_scaled_identity(self, alpha: Scalar) -> Self:
        """Add to the real parts."""
        each = alpha[..., None, None] if isinstance(alpha, Tensor) and alpha.ndim else alpha
        first = (self.q[..., :1] + each).to(self.dtype)
        return self._build([torch.cat([first, self.q[..., 1:]], -1)])

    def solve(self, X: Tensor) -> Tensor:
        """Multiply by the inverse.

        Raises:
            RuntimeError: If ``A`` is singular (``torch.linalg.LinAlgError``).
        """
        wide = at_least_float32(X.dtype)
        return self.to(wide).inverse().apply(X.to(wide)).to(X.dtype)

    def inverse(self) -> Self:
        """The conjugate over ``|q|^2``.

        Raises:
            RuntimeError: If ``A`` is singular (``torch.linalg.LinAlgError``).
        """
        size = self._absolute()
        check_pivots(size)
        return self._build([self._conjugate() / size[..., None] / size[..., None]])

    def _absolute(self) -> Tensor:
        return lengths(self.q)[..., 0]

    def exp(self) -> Self:
        """``e^a (cos |v| + v sin |v| / |v|)`` of ``a + v``, the real part and the rest."""
        wide = self.q.to(at_least_float32(self.dtype))
        a, v = wide[..., :1], wide[..., 1:]
        size = lengths(v)
        numbers = a.exp() * torch.cat([size.cos(), v * torch.sinc(size / math.pi)], -1)
        return self._build([numbers.to(self.dtype)])

    def logdet(self) -> Tensor:
        """Sum of ``d log |q|``."""
        return self.q.shape[-1] * self._absolute().log().sum(-1)

    def max_abs(self) -> Tensor:
        """Largest absolute entry."""
        return largest(self.q, self.q.ndim - 2)

    def spectral_norm(self) -> Tensor:
        """Largest ``|q|``; zero for ``n = 0``."""
        return largest(self._absolute(), self.q.ndim - 2)

    def frobenius_norm(self) -> Tensor:
        """``sqrt(d)`` times the norm of all numbers."""
        return math.sqrt(self.q.shape[-1]) * torch.linalg.vector_norm(self.q, dim=(-2, -1))


@composition
def complex_numbers() -> Structure:
    """Complex numbers ``a + i b`` on the diagonal, as blocks ``[[a, -b], [b, a]]``."""
    return Structure(Hypercomplex, (2,), label="complex_numbers")


@composition
def quaternions() -> Structure:
    """Quaternions on the diagonal, as blocks of size 4 that multiply by them from the left."""
    return Structure(Hypercomplex, (4,), label="quaternions")
