"""The laws of methods hold for all of them, and each finds the method that breaks it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from singd import KFAC, SINGD, SOAP, Averages, KLShampoo, KroneckerOptimizer
from singd.capture.statistics import Columns, Side, Statistic
from singd.methods.base import Options, Products, Stack
from singd.methods.inverse_free import InverseFree, InverseFreeFactors
from singd.testing import LAWS, check_method
from tests.singd import paper

Make = Callable[..., KroneckerOptimizer]

METHODS: dict[str, Make] = {
    "SINGD": lambda model, params: SINGD(model, params, T=2, burn_in=0),
    "SINGD, structured": lambda model, params: SINGD(
        model, params, T=1, structures=("hierarchical(1, 1)", "lower_toeplitz")
    ),
    "SINGD, automatic": lambda model, params: SINGD(model, params, T=1, structures="auto"),
    "INGD": lambda model, params: SINGD(
        model, params, T=1, structures=("dense", "dense"), alpha1=0.5
    ),
    "IKFAC": lambda model, params: SINGD(model, params, T=1, kfac_like=True),
    "SINGD, grafted": lambda model, params: SINGD(model, params, T=2, burn_in=0, graft="adamw"),
    "the paper's SINGD": lambda model, params: paper.SINGD(model, params, T=2, kl_clip=1e-2),
    "KFAC": lambda model, params: KFAC(model, params, T=2),
    "KL-Shampoo": lambda model, params: KLShampoo(model, params, T=2),
    "KL-Shampoo, blocks": lambda model, params: KLShampoo(
        model, params, T=1, structures=("dense", "block_diagonal(2)")
    ),
    "SOAP": lambda model, params: SOAP(model, params, basis_interval=2),
    "SOAP, few directions": lambda model, params: SOAP(model, params, rank=2),
    "SOAP, some sides": lambda model, params: SOAP(model, params, max_dim=4, T=2),
    "root-free Shampoo": lambda model, params: KLShampoo(
        model, params, T=1, structures="hierarchical(1, 1)", power=1
    ),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("method", METHODS)
def test_methods_keep_the_laws(method: str, law: str) -> None:
    check_method(METHODS[method], laws=[law])


# Methods with one fault each ---------------------------------------------------------------------


class Ascends(InverseFree):
    """The sign of the direction is wrong."""

    def precondition(self, factors: Any, G: Tensor, products: Products) -> Tensor:
        return -super().precondition(factors, G, products)


class ClimbsInBiases(InverseFree):
    """The sign of the direction is wrong in the last column, that of the bias."""

    def precondition(self, factors: Any, G: Tensor, products: Products) -> Tensor:
        D = super().precondition(factors, G, products)
        return torch.cat([D[..., :-1], -D[..., -1:]], -1)


class ForgetsBiases(InverseFree):
    """The last column of the direction is zero."""

    def precondition(self, factors: Any, G: Tensor, products: Products) -> Tensor:
        D = super().precondition(factors, G, products)
        return torch.cat([D[..., :-1], 0 * D[..., -1:]], -1)


class Mixes(InverseFree):
    """Curvature is averaged over the matrices that happen to be side by side."""

    def update_all(self, stacks: Any, options: Options, step: int) -> Any:
        return super().update_all((self._mixed(stack) for stack in stacks), options, step)

    @staticmethod
    def _mixed(stack: Stack) -> Stack:
        def mixed(U: Statistic) -> Statistic:
            return U.with_tensors(
                [t.mean(0, keepdim=True).expand_as(t).clone() for t in U.tensors()]
            )

        both = stack.statistics
        return replace(stack, statistics=Averages(mixed(both.input), mixed(both.grad)))


class CountsUses(InverseFree):
    """Every use of a layer adds something, so that sums depend on how a batch was cut."""

    def summarize(self, factors: Any, side: Side, columns: Columns, options: Options) -> Statistic:
        sums = super().summarize(factors, side, columns, options)
        return Statistic(sums.value.add_scaled_identity(1.0), sums.kind, sums.trace)


class WritesInPlace(InverseFree):
    """An update writes to the factors that it is given."""

    def update_all(self, stacks: Any, options: Options, step: int) -> Any:
        for stack in stacks:
            for member in stack.factors.members().values():
                for t in member.tensors():
                    t.mul_(0.9)
            yield from super().update_all([stack], options, step)


class BiasesApart(InverseFree):
    """No fault: directions of weights and biases in two tensors."""

    def is_apart(self, factors: Any, products: Products) -> bool:
        return True

    def apply_apart(
        self, factors: Any, G: Tensor, g: Tensor, products: Products
    ) -> tuple[Tensor, Tensor]:
        D = self.precondition(factors, torch.cat([G, g], -1), products)
        return D[..., :-1].contiguous(), D[..., -1:].contiguous()


class WritesToGradients(InverseFree):
    """The memory of the gradient is used once the direction is made."""

    def precondition(self, factors: Any, G: Tensor, products: Products) -> Tensor:
        D = super().precondition(factors, G, products)
        G.mul_(2)
        return D


class ReturnsGradients(InverseFree):
    """The direction is the gradient itself, whose length the optimizer then changes."""

    def precondition(self, factors: Any, G: Tensor, products: Products) -> Tensor:
        return G


class WritesToBiases(BiasesApart):
    """The same of biases that are given apart."""

    def apply_apart(
        self, factors: Any, G: Tensor, g: Tensor, products: Products
    ) -> tuple[Tensor, Tensor]:
        D, d = super().apply_apart(factors, G, g, products)
        g.mul_(2)
        return D, d


class BiasTwice(BiasesApart):
    """Moves biases twice as far where they are given apart."""

    def apply_apart(
        self, factors: Any, G: Tensor, g: Tensor, products: Products
    ) -> tuple[Tensor, Tensor]:
        D, d = super().apply_apart(factors, G, g, products)
        return D, 2 * d


class OtherShapes(InverseFree):
    """More is stored than the meta device says."""

    def init(self, shape: Sequence[int], *args: Any, **like: Any) -> InverseFreeFactors:
        factors = super().init(shape, *args, **like)
        if torch.device(like["device"]).type == "meta":
            return factors
        return replace(factors, m_K=factors.K * 0, m_C=factors.C * 0)

    def update_all(self, stacks: Any, options: Options, step: int) -> Any:
        for new in super().update_all(stacks, options, step):
            yield replace(new, m_K=new.K * 0, m_C=new.C * 0)


class Remembers(InverseFree):
    """Something that directions depend on is not in the state."""

    first_step: int | None = None

    def update_all(self, stacks: Any, options: Options, step: int) -> Any:
        self.first_step = step if self.first_step is None else self.first_step
        return super().update_all(stacks, options, step)

    def precondition(self, factors: Any, G: Tensor, products: Products) -> Tensor:
        return super().precondition(factors, G, products) + (1 + (self.first_step or 0)) * G


class OverflowsInHalf(InverseFree):
    """A number that bfloat16 can't hold is needed."""

    def precondition(self, factors: Any, G: Tensor, products: Products) -> Tensor:
        D = super().precondition(factors, G, products)
        return D if G.dtype == torch.float64 else D * 3e38 * 3e38


BROKEN: dict[type[InverseFree], str] = {
    Ascends: "descends",
    ClimbsInBiases: "descends",
    ForgetsBiases: "descends",
    Mixes: "stack",
    CountsUses: "micro_batches",
    WritesInPlace: "pure",
    WritesToGradients: "gradients_stay",
    ReturnsGradients: "gradients_stay",
    WritesToBiases: "gradients_stay",
    BiasTwice: "apart",
    OtherShapes: "meta_shapes",
    Remembers: "round_trip",
    OverflowsInHalf: "low_precision",
}


def broken(method: type[InverseFree]) -> Make:
    def make(model: Any, params: Any) -> KroneckerOptimizer:
        options = dict(
            SINGD(torch.nn.Linear(1, 1), T=2, burn_in=0, structures=("dense", "dense")).defaults
        )
        return KroneckerOptimizer(model, method(), params, options)

    return make


@pytest.mark.parametrize("method", BROKEN)
def test_a_broken_method_fails_its_law_alone(method: type[InverseFree]) -> None:
    failed = []
    for each in LAWS:
        try:
            check_method(broken(method), laws=[each])
        except AssertionError:
            failed.append(each)
    assert failed == [BROKEN[method]]


class Doubles(InverseFree):
    """Replaces the direction, and inherits other forms of it."""

    def precondition(self, factors: Any, G: Tensor, products: Products) -> Tensor:
        return 2 * super().precondition(factors, G, products)


class SaysApart(Doubles):
    """Says anew where weights and biases are given apart, and inherits how."""

    def is_apart(self, factors: Any, products: Products) -> bool:
        return super().is_apart(factors, products)


def doubling() -> InverseFree:
    """One whose direction is replaced on the object."""
    method = InverseFree()
    made = method.precondition
    method.precondition = lambda *args: 2 * made(*args)  # type: ignore[method-assign]
    return method


@pytest.mark.parametrize("other", [Doubles, SaysApart, doubling])
def test_a_direction_that_is_replaced_is_the_one_that_is_taken(
    other: Callable[[], InverseFree],
) -> None:
    """Also where another form of it would cost less: of weights and biases apart."""
    directions = []
    for method in (InverseFree, other):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        structures = ("diagonal", "diagonal")
        options = dict(SINGD(model, structures=structures, graft=None).defaults)
        optimizer = KroneckerOptimizer(model, method(), None, options)
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.precondition()
        directions.append([p.grad for p in model.parameters()])
    for once, twice in zip(*directions, strict=True):
        torch.testing.assert_close(2 * once, twice)


def test_an_unknown_law_is_named() -> None:
    with pytest.raises(ValueError, match=r"descends.*got 'ascends'"):
        check_method(METHODS["SINGD"], laws=["ascends"])
