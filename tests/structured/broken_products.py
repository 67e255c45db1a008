"""Structures broken in products in other forms, and in solves of the transpose: in ``BROKEN``."""

import torch

from structured import Diagonal, LowerTriangular
from structured._products.in_place import plain
from tests.structured.broken import fails


@fails("apply_overwriting")
class DoublesWhatItOverwrites(Diagonal):
    def apply_overwriting(self, X):
        return 2 * super().apply_overwriting(X)


@fails("apply_overwriting")
class OverwritesWhatIsTooSmall(Diagonal):
    """Takes it that ``X`` has the batch dimensions of the product."""

    def apply_overwriting(self, X):
        return X.mul_(self.d[..., None]) if plain(X, self.d) else self.apply(X)


@fails("apply_rows")
class DoublesTheSecondPart(Diagonal):
    def apply_rows(self, X, x):
        Y, y = super().apply_rows(X, x)
        return Y, 2 * y


@fails("apply_rows")
class GivesRowsBack(Diagonal):
    """Where there is nothing to multiply."""

    def apply_rows(self, X, x):
        Y, y = super().apply_rows(X, x)
        same = plain(X, self.d) and not X.is_meta and torch.equal(X, Y)
        return (X, y) if same else (Y, y)


@fails("apply_rows", "fresh", "deterministic", "autocast", "mapped")
class WritesToItsRows(Diagonal):
    def apply_rows(self, X, x):
        Y, y = super().apply_rows(X, x)
        return Y, x.copy_(y) if plain(x, y) and y.shape == x.shape else y


class _ForgetsRows(Diagonal):
    def apply_rows(self, X, x):
        return super().apply_rows(X, x)[0], x.clone()


@fails("apply_rows")
class OuterThatForgetsRows(Diagonal):
    def outer(self):
        return _ForgetsRows(self.d.square())


class _AppliesTwice(Diagonal):
    def apply_overwriting(self, X):
        return self.apply(super().apply_overwriting(X))


@fails("apply_overwriting")
class OuterThatAppliesTwice(Diagonal):
    def outer(self):
        return _AppliesTwice(self.d.square())


@fails("singular")
class DividesByZeroInTheTranspose(Diagonal):
    def solve_transpose(self, X):
        return X / self.d[..., None]


@fails("solve_transpose")
class SolvesWithoutTransposing(LowerTriangular):
    def solve_transpose(self, X):
        return self.solve(X)
