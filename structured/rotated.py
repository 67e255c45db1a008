"""A structure in another orthonormal basis: a fast transform, or any orthogonal matrix.

::

    Q A Q^T        the numbers of A; products those of A and two products with Q
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Size, Tensor

from structured._core.composite import Composite
from structured._core.matrix import Operator, Scalar, StructuredMatrix, at_least_float32, static
from structured._core.spec import StructureLike, parse, words
from structured._core.stored import Stored
from structured._transforms.cosine import cosine, inverse_cosine
from structured._transforms.hadamard import hadamard
from structured._transforms.mirror import mirror, unmirror

_COLUMNS = 256  # transformed at a time on the CPU (measured)

# name -> (Q X, Q^T X)
_TRANSFORMS = {
    "cosine": (inverse_cosine, cosine),
    "hadamard": (hadamard, hadamard),
    "mirror": (unmirror, mirror),
}
words(*_TRANSFORMS)


def _is_permutation(Q: Tensor) -> bool:
    return not (Q.is_floating_point() or Q.is_complex())


def _apply(Q: Operator, X: Tensor, *, transpose: bool) -> Tensor:
    """``Q X`` or ``Q^T X``; an operator of another dtype is converted, or else ``X`` is."""
    if Q.dtype != X.dtype and isinstance(Q, Stored | Composite):
        Q = Q.to(X.dtype)
    X = X.to(Q.dtype)
    return Q.apply_transpose(X) if transpose else Q.apply(X)


class Rotated(StructuredMatrix):
    """``Q A Q^T`` for a member ``A`` of any structure and an orthogonal ``Q``.

    The columns of ``Q`` are the basis in which the matrix has the structure of ``A``. ``Q`` belongs
    to the structure: it is shared by all members and is neither added, scaled nor trained. A
    diagonal matrix in the eigenbasis of a moving average is the preconditioner of SOAP (Vyas et
    al., arXiv 2409.11321). As Frobenius norms do not change, ``Pi(S) = Q Pi_A(Q^T S Q) Q^T``.

    Args:
        A: A member of the structure to rotate.
        Q: ``"cosine"`` (the basis of the orthonormal DCT-II), ``"hadamard"`` (one Sylvester matrix
            for each binary digit of n: 13 = 8 + 4 + 1), ``"mirror"`` (vectors that the reversal of
            the rows leaves alone, then those that it turns round), an orthogonal tensor
            ``[..., n, n]``, a permutation as integers ``[n]`` (``Q X`` is ``X[Q]``), or any
            orthogonal operator, such as a Kronecker product of eigenvectors or a transform of your
            own. None is checked to be orthogonal. Batch shapes of ``A`` and ``Q`` broadcast.
    """

    A: StructuredMatrix  # [..., n, n]
    Q: Tensor | Operator | str = static()  # [..., n, n], orthogonal

    def __post_init__(self) -> None:
        super().__post_init__()
        n, Q = self.A.n, self.Q
        if isinstance(Q, str):
            if Q not in _TRANSFORMS:
                raise ValueError(f"rotated(A, Q): expected one of {list(_TRANSFORMS)}, got {Q!r}")
        elif not isinstance(Q, Tensor | Operator):
            raise TypeError(
                f"rotated(A, Q): expected a name, a tensor or an operator, got {type(Q).__name__}"
            )
        elif isinstance(Q, Tensor) and _is_permutation(Q):
            if Q.shape != (n,):
                raise ValueError(f"rotated(A, Q): expected indices [{n}], got {list(Q.shape)}")
        elif Q.shape[-2:] != (n, n):
            raise ValueError(f"rotated(A, Q): expected Q [..., {n}, {n}], got {list(Q.shape)}")
        elif self._bases:
            self._take_bases()

    def _take_bases(self) -> None:
        """A member for each basis."""
        ours, theirs = self.A.batch_shape, self._bases
        try:
            joint = torch.broadcast_shapes(ours, theirs)
        except RuntimeError:
            raise ValueError(
                f"rotated(A, Q): expected a batch of Q that broadcasts with {list(ours)}, "
                f"got {list(theirs)}"
            ) from None
        if joint != ours:
            object.__setattr__(self, "A", self.A.expand(*joint))

    @property
    def closed_under_transpose(self) -> bool:  # type: ignore[override]  # depends on the part
        """As ``A``."""
        return self.A.closed_under_transpose

    @classmethod
    def zeros(
        cls,
        n: int,
        structure: StructureLike,
        Q: Tensor | Operator | str,
        *,
        batch_shape: Sequence[int] = (),
        **opts: Any,
    ) -> Self:
        """The zero matrix of size ``n`` of ``structure`` in the basis ``Q``.

        Raises:
            ValueError: If ``Q`` is an unknown name or a tensor of another size.
            TypeError: If ``Q`` is neither a name, a tensor nor an operator.
        """
        return cls(parse(structure)(n, batch_shape=batch_shape, **opts), Q)

    def _rotate(self, X: Tensor) -> Tensor:
        """``Q X``, in float32 at least."""
        return self._product(X, transpose=False)

    def unrotate(self, X: Tensor) -> Tensor:
        """``Q^T X``, in float32 at least."""
        return self._product(X, transpose=True)

    def _product(self, X: Tensor, *, transpose: bool) -> Tensor:
        wide = X.to(at_least_float32(X.dtype))
        if isinstance(self.Q, str) and not X.numel():
            return X
        if isinstance(self.Q, str):
            return _TRANSFORMS[self.Q][transpose](wide).to(X.dtype)
        if isinstance(self.Q, Operator):
            return _apply(self.Q, wide, transpose=transpose).to(X.dtype)
        if _is_permutation(self.Q):
            return X.index_select(-2, self.Q.argsort() if transpose else self.Q)
        Q = self.Q.to(wide.dtype)
        return ((Q.mT if transpose else Q) @ wide).to(X.dtype)

    def _by_columns(self, function: Callable[[Tensor], Tensor], X: Tensor) -> Tensor:
        """``function`` of some columns at a time, so that what lies between stays in the cache."""
        if X.shape[-1] <= _COLUMNS or not X.is_cpu or not isinstance(self.Q, str):
            return function(X)
        return torch.cat([function(columns) for columns in X.split(_COLUMNS, -1)], -1)

    def rebase(self, Q: Tensor | Operator | str) -> Rotated:
        """The nearest matrix with the structure of ``A`` in another basis ``Q``.

        ``Q P_A(Q^T M Q) Q^T`` for this matrix ``M``; at the cost of products with n columns.

        Raises:
            ValueError: As the class.
            TypeError: As the class.
        """
        return Rotated(self.A, Q).orthogonal_project(self.to_dense())

    def to_dense(self) -> Tensor:
        """``Q A Q^T``."""
        return self._rotate(self._rotate(self.A.to_dense()).mT).mT

    @property
    def shape(self) -> Size:
        """``[..., n, n]``."""
        return self.A.shape

    @property
    def _bases(self) -> Size:
        """Batch shape of the basis, if members have one each."""
        return Size() if isinstance(self.Q, str) else self.Q.shape[:-2]

    def _picked(self, pick: Callable[[Tensor], Tensor]) -> Rotated:
        """As of any member, each with its own basis."""
        A = self.A._picked(pick)
        if not self._bases:
            return self._build([A])
        if not isinstance(self.Q, Tensor):
            raise TypeError(f"Rotated[k]: expected a tensor Q, got {type(self.Q).__name__}")
        return Rotated(A, pick(self.Q.expand(self.shape)))

    def _summed(self, dims: tuple[int, ...]) -> Self:
        """As of any member, where those that are added have one basis."""
        first = len(self.A.batch_shape) - len(self._bases)
        if any(each >= first for each in dims):
            raise ValueError(
                f"Rotated.sum: expected one basis Q for all, got a batch {list(self._bases)}"
            )
        return self._build([self.A._summed(dims)])

    @property
    def mT(self) -> Rotated:
        """``Q A^T Q^T``."""
        return Rotated(self.A.mT, self.Q)

    def matmul(self, other: Self) -> Self:
        """``Q A B Q^T``."""
        return self._build([self.A.matmul(other.A)])

    def apply(self, X: Tensor) -> Tensor:
        """``Q (A (Q^T X))``."""
        return self._by_columns(lambda x: self._rotate(self.A.apply(self.unrotate(x))), X)

    def apply_transpose(self, X: Tensor) -> Tensor:
        """``Q (A^T (Q^T X))``."""
        return self._by_columns(lambda x: self._rotate(self.A.apply_transpose(self.unrotate(x))), X)

    def orthogonal_project(self, M: Tensor) -> Self:
        """``Q P_A(Q^T M Q) Q^T``."""
        return self._build([self.A.orthogonal_project(self.unrotate(self.unrotate(M).mT).mT)])

    def project(self, S: Tensor) -> Self:
        """``Q Pi_A(Q^T S Q) Q^T``."""
        return self._build([self.A.project(self.unrotate(self.unrotate(S).mT))])

    def project_gram(self, X: Tensor) -> Self:
        """``Q Pi_A(Y Y^T) Q^T`` with ``Y = Q^T X``."""
        return self._build([self.A.project_gram(self._by_columns(self.unrotate, X))])

    def orthogonal_project_gram(self, X: Tensor) -> Self:
        """``Q P_A(Y Y^T) Q^T`` with ``Y = Q^T X``."""
        return self._build([self.A.orthogonal_project_gram(self._by_columns(self.unrotate, X))])

    def gram(self) -> Self:
        """``Q Pi_A(A^T A) Q^T``."""
        return self._build([self.A.gram()])

    def exp(self) -> Self:
        """That of ``A`` in the basis ``Q``."""
        return self._build([self.A.exp()])

    def trace(self) -> Tensor:
        """As ``A``."""
        return self.A.trace()

    def add_scaled_identity(self, alpha: Scalar) -> Self:
        """``Q (A + alpha I) Q^T``."""
        return self._build([self.A.add_scaled_identity(alpha)])

    def solve(self, X: Tensor) -> Tensor:
        """``Q (A^{-1} (Q^T X))``."""
        return self._rotate(self.A.solve(self.unrotate(X)))

    def inverse(self) -> Self:
        """``Q A^{-1} Q^T``."""
        return self._build([self.A.inverse()])

    def logdet(self) -> Tensor:
        """As ``A``."""
        return self.A.logdet()

    def spectral_norm(self) -> Tensor:
        """As ``A``."""
        return self.A.spectral_norm()

    def frobenius_norm(self) -> Tensor:
        """As ``A``."""
        return self.A.frobenius_norm()
