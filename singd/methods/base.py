"""The seam for methods: what an author writes, and what the optimizer's shell calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from singd.capture.statistics import Columns, Side, Statistic
from singd.capture.weight_matrix import WeightMatrix
from singd.methods.records import Averages, Factors, Options, Products, Stack
from structured import Operator, Structure, StructuredMatrix

Sent = Callable[[Mapping[WeightMatrix, Options]], Mapping[WeightMatrix, float]]


class Method(ABC):
    """A second-order method. Derive, and hand an instance to :class:`singd.KroneckerOptimizer`.

    **You must** write :meth:`init`, :meth:`update` and :meth:`precondition`, and :meth:`summarize`
    if ``needs_activations``. **You may** write the others. A method holds no state of its own:
    options come with each call, factors are given and returned.
    """

    needs_activations = True
    """Whether statistics are sums over inputs and output gradients of layers, seen by hooks.

    Otherwise :meth:`update` is given the gradients, and every parameter of two or more dimensions
    is preconditioned.
    """

    is_split = False
    """Whether a direction is a product with each factor: :meth:`apply_grad` of :meth:`apply_input`.

    Then ranks that have rows of a gradient can make their share of it.
    """

    members_of: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Names of the members of each side, where ranks may share them: see :meth:`separable`."""

    revises = False
    """Whether :meth:`revise` is called after every step."""

    identity: tuple[str, ...] = ("structures",)
    """Options that a checkpoint must share with the optimizer that loads it."""

    # You must write -----------------------------------------------------------------------------

    @abstractmethod
    def init(
        self,
        shape: Sequence[int],
        structures: Sequence[Structure],
        options: Options,
        *,
        batch_shape: Sequence[int] = (),
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> Any:
        """The :class:`Factors` before any update.

        Args:
            shape: Shape of the matrix, ``(..., d_out, d_in)``, the bias counted as an input; or of
                the parameter, where a method needs no activations.
            structures: What :meth:`structures` gave.
            options: Options of the parameter group.
            batch_shape: Further leading dimensions.
            dtype: Data type of the weight.
            device: Device of the weight; ``"meta"`` to know the shapes alone.
        """

    @abstractmethod
    def update(self, factors: Any, statistics: Any, options: Options, step: int) -> Any:
        """New factors; those given are not changed.

        Args:
            factors: Factors of equal matrices, side by side along the first dimension.
            statistics: Their :class:`Averages`; or gradients ``[matrices, ..., d_out, d_in]``.
            options: Options of the parameter group.
            step: Number of steps so far.
        """

    @abstractmethod
    def precondition(self, factors: Any, G: Tensor, products: Products) -> Tensor:
        """The direction for gradients ``G [matrices, ..., d_out, d_in]``, a new tensor like it.

        Args:
            factors: Factors of equal matrices.
            G: Their gradients.
            products: What :meth:`products` made of the factors.
        """

    def summarize(self, factors: Any, side: Side, columns: Columns, options: Options) -> Statistic:
        """What to sum of the inputs, or of the output gradients, of one use of a layer.

        Args:
            factors: Factors of one matrix, without the batch dimension.
            side: ``"input"`` or ``"grad"``.
            columns: The columns ``X [..., n, R]`` as a :meth:`~Columns.tensor`, or the
                :meth:`~Columns.squares` on the diagonal of ``X X^T``.
            options: Options of the parameter group.
        """
        raise NotImplementedError(f"{type(self).__name__} needs activations: write summarize()")

    # You may write ------------------------------------------------------------------------------

    def check(self, options: Options) -> None:
        """Raise ``ValueError`` if an option is out of range."""
        return

    def structures(
        self, name: str, shape: Sequence[int], input_structure: str | None, options: Options
    ) -> tuple[Structure, ...]:
        """The structures of the factors of a matrix.

        Args:
            name: Name of the weight in the model.
            shape: Shape of the matrix, without a bias.
            input_structure: Structure of the input side, where the inputs leave no choice.
            options: Options of the parameter group.
        """
        return ()

    def layout(self, options: Options) -> tuple[Any, ...]:
        """The options that the stored factors depend on: if they change, factors are fitted.

        Those of :attr:`identity`, unless a method says otherwise.
        """
        return tuple(options.get(name) for name in self.identity)

    def storage(self, factors: Any, options: Options) -> Mapping[str, str]:
        """The forms in which members are stored, by name: of :data:`singd.ops.storage.FORMS`.

        Members that are not named are stored as they are. If all are named, no :meth:`products` of
        them are kept. Arguments are what :meth:`init` gave, and the options of the group.
        """
        return {}

    def needs_factors(self, factors: Any, options: Options) -> bool:
        """Whether :meth:`summarize` needs the numbers of the factors of one matrix, not shapes."""
        return self.needs_activations

    def apply_input(self, factors: Any, G: Tensor, products: Products) -> Tensor:
        """The product of some rows of gradients, ``[matrices, rows, d_in]``, with the input factor.

        Arguments are those of :meth:`precondition`; the result may be wider.
        """
        raise NotImplementedError(f"{type(self).__name__} is not split")

    def apply_grad(self, factors: Any, G: Tensor, products: Products) -> Tensor:
        """The product of the other factor with some columns ``[matrices, d_out, columns]``."""
        raise NotImplementedError(f"{type(self).__name__} is not split")

    def mixed_rows(self, factors: Any) -> int | None:
        """How many neighbouring rows of a gradient a direction mixes; ``None`` for all of them.

        Then ranks that have such rows make their directions alone, by :meth:`apply_rows`.
        """
        return None

    def apply_rows(self, factors: Any, G: Tensor, products: Products, rows: slice) -> Tensor:
        """The direction for some rows of gradients, ``[matrices, rows, d_in]``.

        Args:
            factors: Factors of equal matrices.
            G: Rows of their gradients.
            products: What :meth:`products` made of the factors.
            rows: Which they are: multiples of :meth:`mixed_rows`, or the last ones.
        """
        raise NotImplementedError(f"{type(self).__name__} mixes all rows")

    def is_apart(self, factors: Any, products: Products) -> bool:
        """Whether :meth:`apply_apart` costs less than :meth:`precondition` of both joined.

        Args:
            factors: Factors of equal matrices, whose numbers do not matter.
            products: What :meth:`products` made of them.
        """
        return False

    def apply_apart(
        self, factors: Any, G: Tensor, g: Tensor, products: Products
    ) -> tuple[Tensor, Tensor]:
        """The direction for columns in two parts, as :meth:`precondition` of both side by side.

        Both are new tensors: gradients, which may be those of the parameters, are not written to.

        Args:
            factors: Factors of equal matrices.
            G: Gradients of their weights, ``[matrices, ..., d_out, d_in - 1]``.
            g: Gradients of their biases, ``[matrices, ..., d_out, 1]``.
            products: What :meth:`products` made of the factors.
        """
        raise NotImplementedError(f"{type(self).__name__} takes weights and biases together")

    def speaks_for(self, *names: str) -> bool:
        """Whether methods say of directions what :meth:`precondition` does.

        Not where a subclass, or this object, has replaced that one and inherits one of them.

        Args:
            names: Names of methods that make directions in another way, or say whether they can.
        """
        if "precondition" in vars(self):
            return False
        order = type(self).__mro__
        last, *places = (
            next(i for i, c in enumerate(order) if name in vars(c))
            for name in ("precondition", *names)
        )
        return all(place <= last for place in places)

    def separable(self, factors: Any, side: Side, options: Options, *, whole: bool) -> int | None:
        """How many neighbours of a side are a block that ranks may share (of ``whole`` columns)."""
        return None

    def update_all(self, stacks: Iterable[Stack], options: Options, step: int) -> Iterator[Any]:
        """:meth:`update` of many stacks of one group, in order; a place for a fused form."""
        for stack in stacks:
            yield self.update(stack.factors, stack.statistics, options, step)

    def roots(self, factors: Any) -> tuple[StructuredMatrix, StructuredMatrix] | None:
        """``K`` and ``C`` with ``K K^T ~ S_K^-1`` and ``C C^T ~ S_C^-1``, whatever their damping.

        For :func:`singd.export`; ``None`` if the factors mean something else. They are of the two
        structures that :meth:`structures` gives, or dense if it gives none.

        Args:
            factors: Factors of one matrix.
        """
        return None

    def revise(
        self,
        groups: Sequence[tuple[dict[str, Any], Mapping[WeightMatrix, Any]]],
        agree: Callable[[Sequence[float]], Sequence[float]],
        sent: Sent,
    ) -> Mapping[WeightMatrix, Any]:
        """Change options of groups in view of their factors.

        Args:
            groups: Options of every group, which may be changed, with factors of its matrices.
            agree: Means of numbers over all ranks, which are to change them alike.
            sent: Bytes that this rank would send in a step for matrices that had other options.

        Returns:
            Factors to go on with, where structures were changed.
        """
        return {}

    def products(self, factors: Any, options: Options) -> Products:
        """Operators worth caching until the next update."""
        return {}

    def typical_steps(self, options: Options) -> Mapping[int, float]:
        """Numbers of steps whose updates stand for all, with their shares, to count operations."""
        return {0: 1.0}

    def residuals(self, factors: Any, averages: Any, options: Options) -> dict[str, Tensor]:
        """Distances of factors from where they rest, ``[matrices, ...]`` by name."""
        return {}


__all__ = ["Averages", "Factors", "Method", "Operator", "Options", "Products", "Stack"]
