"""Structures broken in what follows from products: noted in ``BROKEN`` as well."""

import torch
from torch import Tensor

from structured import Dense, Diagonal, LowerTriangular, Outer, StructuredMatrix
from tests.structured import broken_products
from tests.structured.broken import fails
from tests.structured.broken_conduct import BROKEN

__all__ = ["BROKEN", "broken_products"]


@fails("inverse", "powers")
class InvertsTheTranspose(Dense):
    def inverse(self):
        return self._build([super().inverse().M.mT.clone()])


@fails("inverse")
class InvertsToItsBase(Diagonal):
    def inverse(self):
        return Diagonal(super().inverse().d)

    def solve_member(self, other):
        return self._build([other.d / self.d])

    def __pow__(self, k):
        return self._build([self.d**k])


@fails("division")
class DividesFromTheRight(Dense):
    def solve_member(self, other):
        return other.matmul(self.inverse())


@fails("powers")
class ForgetsTheSign(Diagonal):
    def __pow__(self, k):
        return super().__pow__(abs(k))


@fails("exponential")
class SeriesOfThreeTerms(Diagonal):
    def exp(self):
        return (self @ self / 2 + self).add_scaled_identity(1.0)


@fails("diagonal", "outer")
class ReadsFromTheEnd(Diagonal):
    def diagonal(self):
        return self.d.flip(-1)


@fails("spectral_norm")
class SpectralRadius(LowerTriangular):
    def spectral_norm(self):
        return Diagonal(self.diagonal()).max_abs()


@fails("entries")
class ColumnsFirst(LowerTriangular):
    def __getitem__(self, index):
        return (
            self.mT[index]
            if isinstance(index, tuple) and len(index) > 2
            else super().__getitem__(index)
        )


@fails("entries")
class WritesItsBatchOut(Diagonal):
    def __getitem__(self, index):
        return self.to_dense()[index]


@fails("batch_shapes")
class SumsTheFirst(Diagonal):
    def sum(self, dim=None):
        return super().sum(0 if dim is None and self.batch_shape else dim)


@fails("batch_shapes")
class AddsLikeShapes(Diagonal):
    def __add__(self, other):
        if self.batch_shape != getattr(other, "batch_shape", None):
            raise ValueError(f"expected {self.batch_shape}, got another")
        return super().__add__(other)


@fails("tensors")
class CountsPlaces(Diagonal):
    def numel(self):
        return self.to_dense().numel()


@fails("copies")
class HalvesTheExponent(Diagonal):
    def half(self):
        return self.bfloat16()


@fails("from_dense")
class ReadsTheTranspose(Dense):
    @classmethod
    def from_dense(cls, M, *options):
        return super().from_dense(M.mT, *options)


@fails("random")
class Uniform(Diagonal):
    def randn_like(self, *, generator=None):
        return self.map(lambda t: torch.empty_like(t).uniform_(-1, 1, generator=generator))


@fails("random")
class SamplesTheTranspose(LowerTriangular):
    def sample(self, m, *, generator=None):
        return self.mT.sample(m, generator=generator)


@fails("lazy")
class MultipliesItsTransposeBackwards(LowerTriangular):
    def __matmul__(self, other):
        product = super().__matmul__(other)
        return self.mT.outer() if isinstance(product, Outer) else product


@fails("outer")
class TracesTheRoot(LowerTriangular):
    def squared_rows(self):
        return self.diagonal().square()


@fails("from_dense")
class TurnsIntoTheTranspose(LowerTriangular):
    def to_structure(self, structure):
        return self.mT.to_structure(structure)


@fails("from_dense")
class StaysAsItIs(Diagonal):
    def to_structure(self, structure):
        return self


@fails("from_dense")
class ForgetsWhatIsNotDense(LowerTriangular):
    def to_structure(self, structure):
        found = super().to_structure(structure)
        return found if isinstance(found, Dense) else found.zeros_like()


@fails("constructors")
class TakesAnyShape(Dense):
    def __post_init__(self):
        self._check_real()


@fails("constructors")
class TwoLettersForOneSize(StructuredMatrix):
    """The sum of two diagonal matrices."""

    d: Tensor
    e: Tensor

    dimensions = ("n", "m")
    closed_under_transpose = True

    @classmethod
    def zeros(cls, n, *, batch_shape=(), **opts):
        return cls(torch.zeros(*batch_shape, n, **opts), torch.zeros(*batch_shape, n, **opts))

    def to_dense(self):
        return torch.diag_embed(self.d + self.e)
