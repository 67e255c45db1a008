"""Structures broken on purpose, by the law of the algebra that each breaks: ``BROKEN``."""

from collections.abc import Callable

import torch
from torch import Tensor

from structured import Dense, Diagonal, LowerTriangular, StructuredMatrix, UpperTriangular

BROKEN: dict[Callable[..., StructuredMatrix], set[str]] = {}


def fails(*laws):
    """Note the laws that a class breaks."""

    def note(cls):
        BROKEN[cls] = set(laws)
        return cls

    return note


@fails("product", "batch_shapes", "division", "exponential", "inverse", "powers")
class Tridiagonal(StructuredMatrix):
    """Not closed under multiplication."""

    lower: Tensor
    main: Tensor
    upper: Tensor

    closed_under_transpose = False

    @classmethod
    def zeros(cls, n, *, batch_shape=(), **opts):
        off = torch.zeros(*batch_shape, max(n - 1, 0), **opts)
        return cls(off, torch.zeros(*batch_shape, n, **opts), off.clone())

    def to_dense(self):
        if not self.main.shape[-1]:
            return torch.diag_embed(self.main)
        return (
            torch.diag_embed(self.lower, -1)
            + torch.diag_embed(self.main)
            + torch.diag_embed(self.upper, 1)
        )


class Traceless(StructuredMatrix):
    """Does not contain the identity."""

    M: Tensor

    @classmethod
    def zeros(cls, n, *, batch_shape=(), **opts):
        return cls(torch.zeros(*batch_shape, n, n, **opts))

    def to_dense(self):
        return self.M.tril(-1)


class Affine(Diagonal):
    """Adds a constant in ``to_dense``."""

    def to_dense(self):
        return torch.diag_embed(self.d + 1)


@fails("tensors", "random")
class Halves(StructuredMatrix):
    """Stores numbers that have no place, and changes them."""

    M: Tensor

    @classmethod
    def zeros(cls, n, *, batch_shape=(), **opts):
        return cls(torch.zeros(*batch_shape, n, n, **opts))

    def to_dense(self):
        return self.M.tril()

    def _build(self, parts):
        return super()._build([M.tril() + M.triu(1) / 2 for M in parts])


@fails("zeros", "random", "meta")
class BecomesItsBase(Diagonal):
    def _build(self, parts):
        return Diagonal(*parts)


@fails("zeros", "product", "gram", "add_scaled_identity", "division", "powers")
class ReturnsItsBase(Diagonal):
    closed_under_congruence = False

    def zeros_like(self):
        return Diagonal(super().zeros_like().d)

    def matmul(self, other):
        return Diagonal(super().matmul(other).d)

    def gram(self):
        return Diagonal(super().gram().d)

    def add_scaled_identity(self, alpha):
        return Diagonal(super().add_scaled_identity(alpha).d)


@fails("zeros", "errors")
class AlwaysInDouble(Diagonal):
    @classmethod
    def zeros(cls, n, *, batch_shape=(), dtype=None, device=None):
        return super().zeros(n, batch_shape=batch_shape, dtype=torch.float64, device=device)


@fails("zeros", "identity")
class BeginsAtOne(Diagonal):
    @classmethod
    def zeros(cls, n, *, batch_shape=(), **opts):
        return cls(torch.ones(*batch_shape, n, **opts))


@fails("zeros", "powers")
class LikeItself(Diagonal):
    def zeros_like(self):
        return self.clone()


@fails("apply_transpose", "stationarity", "congruence", "large", "entries", "lazy")
class AssumesSymmetry(Dense):
    def apply_transpose(self, X):
        return self.apply(X)


@fails("apply", "apply_overwriting", "large", "entries", "random", "lazy", "outer")
class AppliesTheTranspose(LowerTriangular):
    def apply(self, X):
        return super().apply_transpose(X)


@fails("apply")
class TakesVectorsForColumns(Diagonal):
    def __matmul__(self, other):
        if isinstance(other, Tensor) and other.ndim == 1:
            return self.apply(other[:, None])
        return super().__matmul__(other)


@fails("apply_transpose")
class MultipliesFromTheLeftOnly(LowerTriangular):
    def __rmatmul__(self, other):
        return super().__rmatmul__(other) if other.ndim == 1 else self.apply(other.mT).mT


@fails("apply_transpose")
class TransposesNoVector(LowerTriangular):
    def __rmatmul__(self, other):
        return super().__matmul__(other) if other.ndim == 1 else super().__rmatmul__(other)


@fails("gram")
class GramOfTheTranspose(Dense):
    def gram(self):
        return self._build([self.M @ self.M.mT])


@fails("outer", "lazy")
class OuterOfTheTranspose(Dense):
    def outer(self):
        return self.gram()


@fails("project", "project_gram", "gram", "stationarity")
class WithoutFactorTwo(StructuredMatrix):
    L: Tensor

    @classmethod
    def zeros(cls, n, *, batch_shape=(), **opts):
        return cls(torch.zeros(*batch_shape, n, n, **opts))

    def to_dense(self):
        return self.L.tril()

    def project(self, S):
        return self.orthogonal_project(S)


@fails("orthogonal_project_gram")
class DoublesOffTheDiagonal(LowerTriangular):
    def orthogonal_project_gram(self, X):
        return self.project_gram(X)


@fails("orthogonal_project", "from_dense")
class ReadsTwice(Diagonal):
    def orthogonal_project(self, M):
        return 2 * super().orthogonal_project(M)

    def project(self, S):
        return super().orthogonal_project(S)


@fails("trace")
class TraceOfAbsolutes(Diagonal):
    def trace(self):
        return self.d.abs().sum(-1)


@fails("trace_product", "batch_shapes")
class InnerProduct(Dense):
    def trace_product(self, other):
        return (self.M * other.M).sum((-2, -1))


@fails("logdet")
class LogdetOfPositives(Diagonal):
    def logdet(self):
        return self.d.log().sum(-1)


@fails("max_abs", "batches", "spectral_norm")
class MixesTheBatch(Diagonal):
    def max_abs(self):
        return self.d.abs().max() if self.d.numel() else self.d.sum()


@fails("frobenius_norm", "outer")
class TwiceTheNorm(LowerTriangular):
    def frobenius_norm(self):
        return 2 * super().frobenius_norm()


@fails("transpose_closure", "outer", "lazy")
class ClaimsClosure(LowerTriangular):
    closed_under_transpose = True
    closed_under_congruence = False


@fails("congruence")
class ForgetsToTranspose(Dense):
    def congruence(self, U):
        return self.matmul(U).matmul(self)


@fails("addition", "copies", "batch_shapes")
class AddsTwice(Diagonal):
    def __add__(self, other):
        return super().__add__(2 * other)


@fails("addition", "batch_shapes")
class SubtractsBackwards(Diagonal):
    def __sub__(self, other):
        return -super().__sub__(other)


@fails("addition")
class NegatesNothing(Diagonal):
    def __neg__(self):
        return self.clone()


@fails("scaling")
class DividesByTheSquare(Diagonal):
    def __truediv__(self, c):
        return super().__truediv__(c * c)


@fails("scaling")
class ScalesTwice(Diagonal):
    def __mul__(self, c):
        return 2 * super().__mul__(c)

    def __rmul__(self, c):
        return super().__mul__(c)


@fails("scaling", "lazy")
class ScaledBackwards(Diagonal):
    def __rmul__(self, c):
        return self / c


@fails("scaling")
class Promotes(Diagonal):
    """Lets a tensor ``c`` of another dtype decide."""

    def __rmul__(self, c):
        scaled = super().__mul__(c)
        return scaled.to(torch.promote_types(c.dtype, self.dtype)) if torch.is_tensor(c) else scaled


@fails("add_scaled_identity")
class ShiftPromotes(Diagonal):
    def add_scaled_identity(self, alpha):
        alpha = alpha[..., None] if isinstance(alpha, Tensor) else alpha
        return self._build([self.d + alpha])


@fails("transpose", "lazy", "outer")
class ItsOwnTranspose(LowerTriangular):
    @property
    def mT(self):
        return self


@fails("transpose", "lazy", "outer")
class NoWayBack(LowerTriangular):
    @property
    def mT(self):
        return _ItsOwnTranspose(self.R)


class _ItsOwnTranspose(UpperTriangular):
    @property
    def mT(self):
        return LowerTriangular(self.R) if self.n < 2 else self


@fails("singular")
class DividesByZero(Diagonal):
    def solve(self, X):
        return X / self.d[..., None]


@fails("singular")
class LooksAtTheFirstOfABatch(Diagonal):
    def solve(self, X):
        one = self.map(lambda t: t[(-1,) * len(self.batch_shape)]) if self.d.numel() else self
        zero = torch.zeros(self.n, 1, dtype=self.dtype, device=self.device)
        Diagonal(one.d).solve(zero[: one.n])
        return X / self.d[..., None]


@fails("stable_solve")
class SolvesNormalEquations(LowerTriangular):
    """Squares the condition number."""

    def solve(self, X):
        wide = torch.promote_types(self.dtype, torch.float32)
        A = self.to_dense().to(wide)
        return torch.linalg.solve(A.mT @ A, A.mT @ X.to(wide)).to(X.dtype)


@fails("solve", "stable_solve", "division", "lazy", "outer")
class SolvesTheTranspose(LowerTriangular):
    def solve(self, X):
        return self.mT.solve(X)
