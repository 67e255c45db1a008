"""The idea: linear spaces of square matrices that are closed under multiplication.

A *structure* is a linear space ``V`` of ``n x n`` matrices that contains the identity and is closed
under multiplication (a unital matrix algebra). A *member* stores a few tensors, and ``to_dense``,
which writes it out, is linear in them. Everything in this file follows from ``to_dense``.

- :class:`Operator` is anything square that can be multiplied by a tensor.
- :class:`Stored` is an immutable record of tensors: copies, conversions, pytrees.
- :class:`Member` is both, with sums and scalings.
- :class:`StructuredMatrix` is a member of a structure: the class to derive from.

Letters: ``n`` the size, ``m`` a number of columns, ``...`` the batch dimensions, ``A``, ``B``
members, ``S`` a symmetric matrix, ``X`` a matrix ``[..., n, m]``.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Self

from torch import Size, Tensor

from structured._core import defaults
from structured._core.algebra import Algebra
from structured._core.closed import read
from structured._core.dispatch import symmetric_product
from structured._core.lazy import Outer
from structured._core.member import Scalar
from structured._core.numbers import (
    add_to_diagonal,
    at_least_float32,
    joint_norm,
    largest,
    trailing,
)
from structured._core.operator import Operator
from structured._core.stored import static

__all__ = [  # all that a structure file needs
    "Operator",
    "Scalar",
    "StructuredMatrix",
    "add_to_diagonal",
    "at_least_float32",
    "joint_norm",
    "largest",
    "static",
    "trailing",
]


class StructuredMatrix(Algebra):
    """A member of a structure: an immutable dataclass of tensors, or of other members.

    **You must** write two methods: :meth:`zeros` and :meth:`to_dense`. Subclassing with annotated
    fields is all it takes: no decorator, no registration.

    >>> class Diagonal(StructuredMatrix):
    ...     d: Tensor  # [..., n]
    ...
    ...     @classmethod
    ...     def zeros(cls, n, *, batch_shape=(), **opts):
    ...         return cls(torch.zeros(*batch_shape, n, **opts))
    ...
    ...     def to_dense(self):
    ...         return torch.diag_embed(self.d)

    **You may** write fast versions of ``shape``, ``mT``, ``matmul``, ``apply``,
    ``apply_transpose``, ``orthogonal_project``, ``orthogonal_project_gram``, ``project``,
    ``project_gram``, ``gram``, ``outer``, ``squared_rows``, ``trace``, ``trace_product``,
    ``congruence``, ``add_scaled_identity``, ``solve``, ``solve_member``, ``inverse``, ``exp``,
    ``diagonal``, ``logdet``, ``max_abs``, ``spectral_norm`` and ``frobenius_norm``. Each
    has a correct default through :meth:`to_dense`. Arguments are checked before your method sees
    them; that of ``solve`` is a matrix. Unchecked are those of ``solve_transpose``,
    ``apply_overwriting`` and, for structures with ``rows_apart``, ``apply_rows``.

    You may also say ``dimensions = ("n",)``, the trailing dimensions of each field: then the
    constructor checks shapes.

    **You get** ``A @ B``, ``A @ X``, ``X @ A``, ``A + B``, ``A - B``, ``c * A``, ``A / c``, ``-A``,
    ``A ** k``, ``A[..., i, j]``, ``shape``, ``dtype``, ``device``, ``batch_shape``, ``identity``,
    ``randn``, ``from_dense``, ``sample``, ``zeros_like``, ``randn_like``, ``to``, ``float``,
    ``double``, ``half``, ``numel``, ``clone``, ``detach``, ``expand``, ``sum`` over the batch,
    ``tensors``, ``with_tensors``, a ``repr``, autograd through every operation, ``torch.compile``
    and pytrees. Batch shapes broadcast.

    ``closed_under_transpose`` says that the transpose of every member is a member (dense, diagonal,
    block-diagonal). Then ``Pi(K^T S K) = K^T Pi(S) K``: curvature may be collected before K is
    applied. It may be a property where it depends on the parts. ``closed_under_congruence`` says
    no more than that, and follows; a structure may say it alone and bring its :meth:`congruence`.
    """

    closed_under_transpose = False
    """Whether the transpose of every member is a member."""

    # You must write, beside zeros ----------------------------------------------------------------

    @abstractmethod
    def to_dense(self) -> Tensor:
        """Write the member out, ``[..., n, n]``, linearly in the stored tensors."""

    # You may write ------------------------------------------------------------------------------

    @property
    def shape(self) -> Size:
        """``[*batch_shape, n, n]``."""
        return defaults.shape(self)

    @property
    def mT(self) -> StructuredMatrix:
        """The transpose, a member of the transposed structure."""
        return Transposed(self)

    def matmul(self, other: Self) -> Self:
        """The product ``A B`` of two members of one structure."""
        return read(self, self.to_dense() @ other.to_dense())

    def apply(self, X: Tensor) -> Tensor:
        """``A X`` for ``X [..., n, m]``."""
        return self.to_dense() @ X

    def apply_transpose(self, X: Tensor) -> Tensor:
        """``A^T X`` for ``X [..., n, m]``."""
        return self.to_dense().mT @ X

    def orthogonal_project(self, M: Tensor) -> Self:
        """``P(M)``, the member nearest to any ``M [..., n, n]`` in the Frobenius norm.

        Reads back a matrix that lies in the space: ``A.orthogonal_project(A.to_dense())`` is ``A``.
        """
        return defaults.orthogonal_project(self, M)

    def project(self, S: Tensor) -> Self:
        """``Pi(S)`` for a symmetric ``S [..., n, n]``, a member like ``self``.

        ``Pi(S)`` is the member ``r`` of least norm with ``P(r + r^T) = 2 P(S)``; equivalently its
        symmetric part is the nearest to ``S``. Only the structure of ``self`` matters.
        """
        return defaults.project(self, S)

    def project_gram(self, X: Tensor) -> Self:
        """``Pi(X X^T)`` for ``X [..., n, m]``, a member like ``self``."""
        return self.project(symmetric_product(X))

    def orthogonal_project_gram(self, X: Tensor) -> Self:
        """``P(X X^T)`` for ``X [..., n, m]``, the member nearest to it in the Frobenius norm."""
        closed = self.closed_under_transpose  # then P is Pi, of what is symmetric
        return self.project_gram(X) if closed else self.orthogonal_project(symmetric_product(X))

    def gram(self) -> Self:
        """``Pi(A^T A)``."""
        return self.project_gram(self.to_dense().mT)

    @property
    def closed_under_congruence(self) -> bool:
        """Whether ``Pi(S)`` is all that ``Pi(A^T S A)`` depends on; see :meth:`congruence`."""
        return self.closed_under_transpose

    def congruence(self, U: Self) -> StructuredMatrix:
        """``Pi(A^T S A)`` from ``U = Pi(S)``; see :attr:`closed_under_congruence`."""
        transposed = self.mT
        if transposed.layout == self.layout:
            return transposed.matmul(U).matmul(self)
        product = self.apply_transpose(U.to_dense().mT).mT  # U A
        return self.orthogonal_project(self.apply_transpose(product))

    def outer(self) -> Operator:
        """``A A^T``, symmetric: a member if the structure is closed under transposition.

        Otherwise an operator: :class:`Outer`, which multiplies twice, where nothing costs less.
        """
        return self.mT.gram() if self.closed_under_transpose else Outer(self)

    def squared_rows(self) -> Tensor:
        """Sums of squares of the rows, ``[..., n]``: the diagonal of ``A A^T``."""
        closed = self.closed_under_transpose
        return self.outer().diagonal() if closed else super().squared_rows()

    def _outer(self) -> Self:
        """``Pi(A A^T)``; what the transpose is by that, see :mod:`structured.transposed`."""
        return self.project_gram(self.to_dense())

    def _squared_columns(self) -> Tensor:
        """Sums of squares of the columns, ``[..., n]``."""
        return self.to_dense().square().sum(-2)


class Transposed(StructuredMatrix):
    """``A^T`` for a member ``A`` of any structure."""

    A: StructuredMatrix  # [..., n, n]

    @property
    def closed_under_transpose(self) -> bool:  # type: ignore[override]  # depends on the part
        """As ``A``."""
        return self.A.closed_under_transpose

    @classmethod
    def zeros(cls, n: int, structure: Any, **opts: Any) -> Self:
        """The zero matrix of size ``n`` in the transpose of ``structure``."""
        if not callable(structure):
            raise TypeError(f"transposed: expected a callable n -> member, got {structure!r}")
        return cls(getattr(structure, "zeros", structure)(n, **opts))

    def to_dense(self) -> Tensor:
        """``A^T``."""
        return self.A.to_dense().mT

    @property
    def shape(self) -> Size:
        """``[..., n, n]``."""
        return self.A.shape

    @property
    def mT(self) -> StructuredMatrix:
        """``A``."""
        return self.A

    def matmul(self, other: Self) -> Self:
        """``A^T B^T = (B A)^T``."""
        return self._build([other.A.matmul(self.A)])

    def apply(self, X: Tensor) -> Tensor:
        """``A^T X``."""
        return self.A.apply_transpose(X)

    def apply_transpose(self, X: Tensor) -> Tensor:
        """``A X``."""
        return self.A.apply(X)

    def orthogonal_project(self, M: Tensor) -> Self:
        """``P_A(M^T)^T``."""
        return self._build([self.A.orthogonal_project(M.mT)])

    def project(self, S: Tensor) -> Self:
        """``Pi_A(S)^T``."""
        return self._build([self.A.project(S)])

    def project_gram(self, X: Tensor) -> Self:
        """``Pi_A(X X^T)^T``."""
        return self._build([self.A.project_gram(X)])

    def orthogonal_project_gram(self, X: Tensor) -> Self:
        """``P_A(X X^T)^T``."""
        return self._build([self.A.orthogonal_project_gram(X)])

    def gram(self) -> Self:
        """``Pi(A A^T)``; by the class of ``A.mT`` if it has one of its own."""
        named = self.A.mT
        if isinstance(named, Transposed) or named.mT.layout != self.A.layout:
            return self._build([self.A._outer()])
        return self._build([named.gram().mT])

    def solve(self, X: Tensor) -> Tensor:
        """``A^-T X``; by the class of ``A.mT`` if it has one of its own."""
        named = self.A.mT
        unnamed = isinstance(named, Transposed)
        return self.A.solve_transpose(X) if unnamed else named.solve(X)

    def squared_rows(self) -> Tensor:
        """Sums of squares of the columns of ``A``; by the class of ``A.mT`` if it has its own."""
        named = self.A.mT
        unnamed = isinstance(named, Transposed)
        return self.A._squared_columns() if unnamed else named.squared_rows()

    def inverse(self) -> Self:
        """``(A^{-1})^T``."""
        return self._build([self.A.inverse()])

    def exp(self) -> Self:
        """``exp(A)^T``."""
        return self._build([self.A.exp()])

    def diagonal(self) -> Tensor:
        """As ``A``."""
        return self.A.diagonal()

    def spectral_norm(self) -> Tensor:
        """As ``A``."""
        return self.A.spectral_norm()

    def trace(self) -> Tensor:
        """As ``A``."""
        return self.A.trace()

    def add_scaled_identity(self, alpha: Scalar) -> Self:
        """``(A + alpha I)^T``."""
        return self._build([self.A.add_scaled_identity(alpha)])

    def logdet(self) -> Tensor:
        """As ``A``."""
        return self.A.logdet()

    def max_abs(self) -> Tensor:
        """As ``A``."""
        return self.A.max_abs()

    def frobenius_norm(self) -> Tensor:
        """As ``A``."""
        return self.A.frobenius_norm()
