"""Structures broken on purpose: each fails exactly the laws that it breaks."""

import pytest
import torch
from torch import Tensor

from structured import Dense, Diagonal, LowerTriangular, StructuredMatrix
from structured.testing import LAWS, check

BROKEN: dict[type[StructuredMatrix], set[str]] = {}


def fails(*laws):
    """Note the laws that a class breaks."""

    def note(cls):
        BROKEN[cls] = set(laws)
        return cls

    return note


@fails("product")
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


@fails("apply_transpose", "stationarity")
class AssumesSymmetry(Dense):
    def apply_transpose(self, X):
        return self.apply(X)


@fails("gram")
class GramOfTheTranspose(Dense):
    def gram(self):
        return self._build([self.M @ self.M.mT])


@fails("outer")
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


@fails("fresh")
class Aliased(Dense):
    def orthogonal_project(self, M):
        return self._build([M])


@fails("fresh", "gradients")
class Modifies(Diagonal):
    """Works in its operand's memory."""

    def apply(self, X):
        return super().apply(X.mul_(1.0))


@fails("trace")
class TraceOfAbsolutes(Diagonal):
    def trace(self):
        return self.d.abs().sum(-1)


@fails("logdet")
class LogdetOfPositives(Diagonal):
    def logdet(self):
        return self.d.log().sum(-1)


@fails("precision")
class Widens(Diagonal):
    def trace(self):
        return self.d.sum(-1, dtype=torch.promote_types(self.d.dtype, torch.float32))


@fails("max_abs", "batches")
class MixesTheBatch(Diagonal):
    def max_abs(self):
        return self.d.abs().max() if self.d.numel() else self.d.sum()


@fails("frobenius_norm")
class TwiceTheNorm(LowerTriangular):
    def frobenius_norm(self):
        return 2 * super().frobenius_norm()


@fails("trace_product")
class InnerProduct(Dense):
    def trace_product(self, other):
        return (self.M * other.M).sum((-2, -1))


@fails("gradients")
class Detaches(Diagonal):
    def matmul(self, other):
        return self._build([self.d.detach() * other.d])


@fails("deterministic")
class Random(Diagonal):
    def apply(self, X):
        return super().apply(X) * (1 + 1e-14 * torch.rand_like(X))


@fails("transpose_closure", "outer")
class ClaimsClosure(LowerTriangular):
    closed_under_transpose = True


@fails("meta", "compiled")
class LooksAtNumbers(Diagonal):
    def solve(self, X):
        if (self.d == 0).any():
            raise ValueError("singular")
        return super().solve(X)


@fails("errors")
class AddsAnything(Diagonal):
    def __add__(self, other):
        return self.map(torch.add, other) if isinstance(other, Diagonal) else self


@fails("views")
class Taciturn(Diagonal):
    def __repr__(self):
        return "a matrix"


@fails("copies")
class ClonesInPlace(Diagonal):
    def clone(self):
        return self


@fails("scaling")
class DividesByTheSquare(Diagonal):
    def __truediv__(self, c):
        return super().__truediv__(c * c)


@fails("transpose")
class ItsOwnTranspose(LowerTriangular):
    @property
    def mT(self):
        return self


@fails("orthogonal_project")
class ReadsTwice(Diagonal):
    def orthogonal_project(self, M):
        return 2 * super().orthogonal_project(M)

    def project(self, S):
        return super().orthogonal_project(S)


@fails("solve")
class SolvesTheTranspose(LowerTriangular):
    def solve(self, X):
        return self.mT.solve(X)


@fails("addition")
class SubtractsBackwards(Diagonal):
    def __sub__(self, other):
        return -super().__sub__(other)


@fails("apply")
class AppliesTheTranspose(LowerTriangular):
    def apply(self, X):
        return super().apply_transpose(X)


def _diagonal():
    class Diagonal(StructuredMatrix):
        d: Tensor

        @classmethod
        def zeros(cls, n, *, batch_shape=(), **opts):
            return cls(torch.zeros(*batch_shape, n, **opts))

        def to_dense(self):
            return torch.diag_embed(self.d)

    return Diagonal


BROKEN[_diagonal()] = {"spec"}  # its name is taken


def failing(structure, laws):
    found = set()
    for law in laws:
        try:
            check(structure, laws=[law], sizes=range(5), examples=20, shrink=False)
        except AssertionError:
            found.add(law)
    return found


@pytest.mark.parametrize("cls", BROKEN)
def test_exactly_the_broken_laws_fail(cls):
    slow = {"compiled"} - BROKEN[cls]
    assert failing(cls, LAWS.keys() - slow) == BROKEN[cls]


@pytest.mark.parametrize(
    ("cls", "laws"),
    [
        (Traceless, {"identity", "add_scaled_identity", "project_trace"}),
        (Affine, {"linear", "zeros"}),
    ],
)
def test_what_is_no_algebra_fails_more(cls, laws):
    assert failing(cls, laws) == laws


def test_every_law_can_fail():
    """All but ``tensors`` and ``trees``, which a subclass has no part in."""
    seen = {"identity", "add_scaled_identity", "project_trace", "linear", "zeros"}
    assert LAWS.keys() - seen.union(*BROKEN.values()) == {"tensors", "trees"}


def test_a_failure_is_named():
    with pytest.raises(AssertionError) as caught:
        check(GramOfTheTranspose)
    said = str(caught.value)
    assert "law 'gram' fails for gram_of_the_transpose" in said
    assert "A = GramOfTheTranspose(2; M: 2 x 2) [float64]" in said  # the smallest there is
