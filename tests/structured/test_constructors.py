"""Constructors say what they expected and what they got, and stand in no transform's way."""

import re

import pytest
import torch

from structured import (
    BlockCirculant,
    BlockDiagonal,
    BlockLower,
    BlockUpper,
    Dense,
    Diagonal,
    DirectSum,
    Hierarchical,
    LowerToeplitz,
    LowerTriangular,
    ScaledIdentity,
    Strided,
    StructuredMatrix,
    Tied,
    UpperTriangular,
    parse,
)
from tests.structured.specs import SPECS


def ones(*shape):
    return torch.ones(shape)


class TwoParts(StructuredMatrix):
    """Diagonal matrices, stored as a sum of two."""

    d: torch.Tensor
    e: torch.Tensor

    dimensions = ("n", "n")

    @classmethod
    def zeros(cls, n, *, batch_shape=(), **opts):
        return cls(torch.zeros(*batch_shape, n, **opts), torch.zeros(*batch_shape, n, **opts))

    def to_dense(self):
        return torch.diag_embed(self.d + self.e)


WRONG = {
    "a rectangle": (lambda: Dense(ones(3, 4)), "[..., 3, 3], got [3, 4]"),
    "a vector": (lambda: Dense(ones(3)), "[..., n, n], got [3]"),
    "a number for a diagonal": (lambda: Diagonal(ones()), "[..., n], got []"),
    "a number for a series": (lambda: LowerToeplitz(ones()), "[..., n], got []"),
    "blocks that are no squares": (lambda: BlockCirculant(ones(2, 3, 2)), "got [2, 3, 2]"),
    "batches of blocks": (
        lambda: BlockDiagonal(ones(4, 2, 3, 3), ones(5, 1, 1)),
        "last: expected shape [4, rest, rest], got [5, 1, 1]",
    ),
    "a dense triangle": (lambda: LowerTriangular(ones(4, 4)), "got [4, 4]; zeros(n)"),
    "a dense upper triangle": (lambda: UpperTriangular(ones(2, 6, 6)), "got [2, 6, 6]"),
    "a corner of another size": (
        lambda: BlockUpper(Diagonal(ones(3)), ones(2, 3), Diagonal(ones(2))),
        "B: expected shape [3, n2], got [2, 3]",
    ),
    "a corner of the other triangle": (
        lambda: BlockLower(Diagonal(ones(3)), ones(3, 2), Diagonal(ones(2))),
        "B: expected shape",
    ),
    "batches that broadcast": (
        lambda: DirectSum(Dense(ones(4, 3, 3)), Dense(ones(2, 2))),
        "C: expected shape [4, n2, n2], got [2, 2]",
    ),
    "rows too short": (
        lambda: Hierarchical(ones(1, 5), ones(2), ones(2, 3)),
        "got [[1, 5], [2], [2, 3]]",
    ),
    "a negative count": (lambda: Tied(Diagonal(ones(3)), -1), "integer k >= 1, got -1"),
    "no classes": (lambda: Strided(Diagonal(ones(3))), "A: expected shape [..., k, q, q]"),
    "a negative size": (lambda: ScaledIdentity(ones(), -2), "size >= 0, got -2"),
    "another class": (
        lambda: TwoParts(ones(2, 3), ones(3)),
        "TwoParts.e: expected shape [2, 3], got [3]",
    ),
    "integers": (lambda: Diagonal(ones(3)).to(torch.int64), "floating-point numbers, got"),
    "complex numbers": (lambda: Tied(Diagonal(ones(3)), 2).to(torch.complex64), "got torch.c"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_shapes(what):
    make, said = WRONG[what]
    with pytest.raises(ValueError, match=re.escape(said)):
        make()


@pytest.mark.parametrize("spec", SPECS)
def test_members_of_every_structure_are_made_within_transforms(spec):
    """From their fields, batched, traced and differentiated."""
    zero = parse(spec)(6, batch_shape=(2,), dtype=torch.float64)

    def again(*tensors):
        member = zero.map(lambda t: t[0]).with_tensors(tensors)
        return member.add_scaled_identity(1.0).to_dense()

    expected = torch.eye(6, dtype=torch.float64).expand(2, 6, 6)
    torch.testing.assert_close(torch.vmap(again)(*zero.tensors()), expected)
    one = [t[0] for t in zero.tensors()]
    _, tangent = torch.func.jvp(again, tuple(one), tuple(torch.ones_like(t) for t in one))
    assert tangent.shape == (6, 6)
