"""Equal matrices side by side, and what a step proposes for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from singd.capture.weight_matrix import WeightMatrix
from singd.methods.base import Factors, Products
from singd.step.groups import Group
from structured import StructuredMatrix


class Batch:
    """Equal matrices and their factors, side by side along a first dimension."""

    def __init__(self, matrices: Sequence[WeightMatrix], group: Group, factors: Factors) -> None:
        self._eager_versions = torch.compiler.disable(self._count_writes)  # not at import
        self.matrices, self.group, self.factors = list(matrices), group, factors
        self._products: Products | None = None
        self._versions: list[int] = []  # of the factors that they were made of
        self.views: list[dict[str, list[Tensor]]] = [
            {name: [t[i] for t in member.tensors()] for name, member in factors.members().items()}
            for i in range(len(self.matrices))
        ]
        members = factors.members()
        self.one = {
            matrix: factors.with_members(
                {name: member.with_tensors(views[name]) for name, member in members.items()}
            )
            for matrix, views in zip(self.matrices, self.views, strict=True)
        }
        """The factors of every matrix alone, views."""
        self._tensors = [t for member in members.values() for t in member.tensors()]
        self._places: dict[tuple[int, ...], Tensor] = {}

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

    def select(self, matrices: Sequence[WeightMatrix], *values: Any) -> tuple[Any, ...]:
        """What belongs to some of the matrices, of factors or products; copies, unless of all."""
        if len(matrices) == len(self.matrices):
            return values
        index = self.index(matrices)
        return tuple(
            value.map(lambda t: t[index])
            if isinstance(value, Factors)
            else {name: product.map(lambda t: t[index]) for name, product in value.items()}
            for value in values
        )

    def index(self, matrices: Sequence[WeightMatrix]) -> Tensor:
        """The places of some of the matrices; made once, since a copy to the device may wait."""
        places = tuple(self.matrices.index(matrix) for matrix in matrices)
        if places not in self._places:
            self._places[places] = torch.tensor(places, device=self.matrices[0].weight.device)
        return self._places[places]

    def replaced(
        self,
        matrices: Sequence[WeightMatrix],
        new: Factors,
        rounded: Callable[..., Tensor],
        before: Factors,
    ) -> Factors:
        """The factors of all, once those of some matrices are ``new``.

        Args:
            matrices: Matrices that are updated.
            new: Their factors.
            rounded: ``rounded(tensor, dtype, names)``, the numbers in the data type of the store.
            before: The factors of all until then.
        """
        changed: dict[str, StructuredMatrix] = {}
        for name, earlier in before.members().items():
            member, tensors = new.members()[name], []
            pairs = zip(member.tensors(), earlier.tensors(), strict=True)
            for number, (t, old) in enumerate(pairs):
                names = [f"{matrix.key} {name} {number}" for matrix in matrices]
                t = rounded(t, old.dtype, names)
                if len(matrices) < len(self.matrices):
                    t = old.index_copy(0, self.index(matrices), t)
                tensors.append(t)
            changed[name] = earlier.with_tensors(tensors)
        return before.with_members(changed)


@dataclass
class Proposal:
    """What a batch will hold if the step is taken."""

    batch: Batch
    factors: Factors
    products: Products
    updated: list[WeightMatrix]  # the matrices whose factors are new
