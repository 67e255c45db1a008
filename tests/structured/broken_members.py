"""Structures broken in what follows from products: noted in ``BROKEN`` as well."""

from structured import Dense, Diagonal
from tests.structured.broken import fails
from tests.structured.broken_conduct import BROKEN

__all__ = ["BROKEN"]


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
