"""Equal matrices side by side, and what a step proposes for them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from singd.capture.weight_matrix import WeightMatrix
from singd.methods.base import Factors, Products
from singd.ops.reference import Indices
from singd.ops.stochastic_rounding import Rounding
from singd.ops.storage import Form, Plain, decode
from singd.step.entries import state_key
from singd.step.groups import Group
from structured import StructuredMatrix

_SELECTIONS = 64  # of the matrices of a batch, whose places are remembered


class Encoded:
    """The factors of a matrix, or of equal matrices side by side, as they are stored.

    Args:
        like: Factors of the same structures, whose numbers do not matter.
        forms: How each tensor of each member is stored.
        tensors: What is stored of each member, the tensors of all its forms in a row.
    """

    def __init__(
        self,
        like: Factors,
        forms: Mapping[str, Sequence[Form]],
        tensors: Mapping[str, Sequence[Tensor]],
    ) -> None:
        self.forms, self.tensors = forms, tensors
        self.plain = {n for n, own in forms.items() if all(isinstance(f, Plain) for f in own)}
        """The members that are stored as they are."""
        self.is_plain = len(self.plain) == len(forms)
        self.like = like if self.is_plain else like.map(lambda t: t.to("meta"))
        self._factors = self._decode() if self.is_plain else None

    def factors(self) -> Any:
        """The factors: where all are plain the stored tensors, else new tensors each time."""
        return self._decode() if self._factors is None else self._factors

    def _decode(self) -> Factors:
        members = self.like.members()
        return self.like.with_members({n: self._of(n, member) for n, member in members.items()})

    def member(self, name: str) -> StructuredMatrix:
        """One member of the factors."""
        return self._of(name, self.like.members()[name])

    def _of(self, name: str, like: StructuredMatrix) -> StructuredMatrix:
        return like.with_tensors(decode(self.tensors[name], self.forms[name]))

    def map(self, function: Callable[[Tensor], Tensor]) -> Encoded:
        """``function`` of every tensor that is stored."""
        return self.changed({n: [function(t) for t in own] for n, own in self.tensors.items()})

    def changed(self, tensors: Mapping[str, Sequence[Tensor]]) -> Encoded:
        """The same factors with other tensors."""
        return Encoded(self.like, self.forms, tensors)

    def real(self) -> list[Tensor]:
        """Real numbers among those stored: not finite where a factor is not."""
        return [t for own in self.tensors.values() for t in own if t.is_floating_point()]


def encode(
    factors: Factors,
    forms: Mapping[str, Sequence[Form]],
    rounding: Rounding | None = None,
    keys: Sequence[str] = ("",),
    indices: Mapping[str, Sequence[Indices]] = MappingProxyType({}),
) -> dict[str, list[Tensor]]:
    """What is stored of the factors of equal matrices, side by side.

    Args:
        factors: Their factors, along the first dimension.
        forms: How each tensor of each member is stored.
        rounding: Rounds by chance; ``None`` for rounding to nearest.
        keys: Keys of the matrices, which the noise depends on.
        indices: Where the numbers lie in whole tensors, of members that ranks share.
    """
    stored: dict[str, list[Tensor]] = {}
    for name, member in factors.members().items():
        stored[name] = []
        for number, (t, form) in enumerate(zip(member.tensors(), forms[name], strict=True)):
            names = [f"{key} {name} {number}" for key in keys]
            if name in indices and rounding is not None and isinstance(form, Plain):
                dtype = form.dtype or t.dtype
                stored[name].append(rounding(t, dtype, names, indices[name][number]))
            else:
                stored[name] += form.encode(t, rounding, names)
    return stored


class Batch:
    """Equal matrices and their factors, side by side along a first dimension.

    Args:
        matrices: Equal matrices.
        group: Group of their weights.
        stored: Their factors.
        indices: Where the numbers of this rank lie in each tensor of a member that ranks share.
    """

    def __init__(
        self,
        matrices: Sequence[WeightMatrix],
        group: Group,
        stored: Encoded,
        indices: Mapping[str, Sequence[Indices]] = MappingProxyType({}),
    ) -> None:
        self._indices = indices
        self._eager_versions = torch.compiler.disable(self._count_writes)  # not at import
        self.matrices, self.group, self.stored = list(matrices), group, stored
        self._products: Products | None = None
        self._versions: list[int] = []  # of the factors that they were made of
        one = [stored.map(operator.itemgetter(i)) for i in range(len(self.matrices))]
        self.one = dict(zip(self.matrices, one, strict=True))
        """The factors of every matrix alone, views."""
        self.keys = {m: {name: state_key(m, name) for name in stored.tensors} for m in matrices}
        """Where the members of every matrix are in the state of its weight."""
        self.shapes = {
            name: [t.shape[1:] for t in member.tensors()]
            for name, member in stored.like.members().items()
        }
        """The shapes of the tensors of every member, of one matrix."""
        self._tensors = [t for own in stored.tensors.values() for t in own]
        self._places: dict[tuple[int, ...], Tensor] = {}

    @property
    def factors(self) -> Any:
        """The factors of all matrices."""
        return self.stored.factors()

    @property
    def products(self) -> Products | None:
        """What was cached of the factors; ``None`` once they have been written to."""
        return None if self._products and self._versions != self._writes() else self._products

    @products.setter
    def products(self, products: Products | None) -> None:
        self._products, self._versions = products, self._writes()

    def _writes(self) -> list[int]:
        """How often factors were written to, which compiled code does not see."""
        return self._eager_versions() if torch.compiler.is_compiling() else self._count_writes()

    def _count_writes(self) -> list[int]:
        return [0 if t.is_inference() else t._version for t in self._tensors]

    def select(
        self, matrices: Sequence[WeightMatrix], stored: Encoded, products: Products
    ) -> tuple[Encoded, Products]:
        """What belongs to some of the matrices, of factors and products; copies, unless of all."""
        if len(matrices) == len(self.matrices):
            return stored, products
        index = self.index(matrices)
        return stored.map(lambda t: t[index]), {
            name: product.map(lambda t: t[index]) for name, product in products.items()
        }

    def index(self, matrices: Sequence[WeightMatrix]) -> Tensor:
        """The places of some of the matrices; made once, since a copy to the device may wait."""
        places = tuple(self.matrices.index(matrix) for matrix in matrices)
        if places not in self._places:
            if len(self._places) >= _SELECTIONS:
                self._places.clear()
            self._places[places] = torch.tensor(places, device=self.matrices[0].weight.device)
        return self._places[places]

    def replaced(
        self, matrices: Sequence[WeightMatrix], new: Factors, rounding: Rounding, before: Encoded
    ) -> Encoded:
        """The factors of all, once those of some matrices are ``new``; until then, ``before``."""
        keys = [matrix.key for matrix in matrices]
        made = encode(new, before.forms, rounding, keys, self._indices)
        if len(matrices) == len(self.matrices):
            return before.changed(made)
        index = self.index(matrices)
        return before.changed(
            {
                name: [t.index_copy(0, index, u) for t, u in zip(own, made[name], strict=True)]
                for name, own in before.tensors.items()
            }
        )


@dataclass
class Proposal:
    """What a batch will hold if the step is taken."""

    batch: Batch
    stored: Encoded
    products: Products
    updated: list[WeightMatrix]  # the matrices whose factors are new
