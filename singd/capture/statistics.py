"""Sums over rows, with counts: what a method makes factors of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from singd.layers import Layer
from singd.layers.base import flatten_rows, square_sums
from singd.ops.parts import Part
from structured import (
    BlockDiagonal,
    Dense,
    StructuredMatrix,
    pack_symmetric,
    unpack_symmetric,
)

Side = Literal["input", "grad"]

Kind = Literal["covariance", "whitened"]
"""What is summed: ``Pi(S)``, or ``Pi(K^T S K)`` of the factor ``K`` of the moment."""

Result = TypeVar("Result")


class UnreadableError(Exception):
    """A module was used in a way that its layer does not describe."""


class Columns:
    """The inputs (or output gradients) of one use of a layer, in the form that a method asks for.

    Args:
        layer: Layer that reads the module.
        module: Module that was used.
        side: ``"input"`` or ``"grad"``.
        values: Input of the module, or gradient of its output.
        approximation: ``"expand"`` or ``"reduce"``.
        ones: Whether the constant input of a bias is appended.
        shape: ``(..., n)``, the shape of a column.
    """

    def __init__(
        self,
        layer: Layer,
        module: Any,
        side: Side,
        values: Tensor,
        approximation: str,
        ones: bool,
        shape: Sequence[int],
    ) -> None:
        self.layer, self.module, self.side, self.values = layer, module, side, values
        self.approximation, self.ones, self.shape = approximation, ones, list(shape)
        self.rows = 0
        """How many rows were summed, once :meth:`tensor` or :meth:`squares` was called."""
        self._counts: tuple[int, int] | None = None

    def tensor(self) -> Tensor:
        """``X [..., n, R]``, one column for each row of the layer's product."""
        X, self.rows = read(self.layer, self._columns)
        self._check(X.shape[:-1])
        return X

    def squares(self) -> Tensor:
        """The diagonal ``[..., n]`` of ``X X^T``, in float32 at least, without making ``X``."""
        sums, self.rows = read(self.layer, self._squares)
        self._check(sums.shape)
        return sums

    @property
    def counts(self) -> tuple[int, int]:
        """Number of samples and of positions of each, of output gradients."""
        if self._counts is None:
            read(self.layer, self._grads)
        return self._counts or (0, 0)

    def _check(self, shape: Sequence[int]) -> None:
        if list(shape) != self.shape:
            raise UnreadableError(
                f"{type(self.layer).__name__} cannot read it (expected {self.side} columns of "
                f"shape {self.shape}, got {list(shape)})"
            )

    def _columns(self) -> tuple[Tensor, int]:
        if self.side == "input":
            return self.layer.columns(self.module, self.values, self.approximation, self.ones)
        B = flatten_rows(self._grads(), self.approximation, average=False)
        return B, B.shape[-1]

    def _squares(self) -> tuple[Tensor, int]:
        if self.side == "input":
            return self.layer.square_sums(self.module, self.values, self.approximation, self.ones)
        grads = self._grads()
        return square_sums(grads, self.approximation, average=False), grads.shape[-3:-1].numel()

    def _grads(self) -> Tensor:
        grads = self.layer.grads(self.module, self.values)
        self._counts = grads.shape[-3], grads.shape[-2]
        return grads


class NoColumns(Columns):
    """Columns ``[..., n, 0]``, of a layer that was not used.

    Args:
        nothing: That tensor.
    """

    def __init__(self, nothing: Tensor) -> None:
        self.nothing, self.rows = nothing, 0

    def tensor(self) -> Tensor:
        """``[..., n, 0]``."""
        return self.nothing

    def squares(self) -> Tensor:
        """Zeros ``[..., n]``, in float32 at least."""
        wide = torch.promote_types(self.nothing.dtype, torch.float32)
        return self.nothing.to(wide).square().sum(-1)


def read(layer: Layer, function: Callable[..., Result], *args: Any) -> Result:
    """``function(*args)``, a reading of ``layer``.

    Raises:
        UnreadableError: If it fails for any reason but a lack of memory.
    """
    try:
        return function(*args)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise UnreadableError(f"{type(layer).__name__} cannot read it ({cause})") from error


class Statistic:
    """A sum over rows, a member of the factor's structure, and what it is a sum of.

    Args:
        value: The sum; or columns ``X [..., n, R]``, which nobody else may change, of a dense
            ``X X^T`` that is made when it is read.
        kind: What is summed.
        trace: ``tr(S) [...]``, where ``value`` does not determine it.
        part: The rows that ``value`` is of, if not of all; then there is a ``trace``, of all.
    """

    def __init__(
        self,
        value: StructuredMatrix | Tensor,
        kind: Kind = "covariance",
        trace: Tensor | None = None,
        part: Part | None = None,
    ) -> None:
        self._held, self.kind, self.trace, self.part = value, kind, trace, part

    @property
    def columns(self) -> Tensor | None:
        """``X``, of a sum that was not read yet."""
        return self._held if isinstance(self._held, Tensor) else None

    @property
    def value(self) -> StructuredMatrix:
        """The sum."""
        if isinstance(self._held, Tensor):
            self._held = Dense(self._held @ self._held.mT)
        return self._held

    def tensors(self) -> list[Tensor]:
        """All numbers of the sum, which may be changed in place."""
        return [*self.value.tensors(), *([] if self.trace is None else [self.trace])]

    def summands(self) -> list[Summand]:
        """All numbers, for sums over ranks."""
        symmetric = isinstance(self.value, Dense | BlockDiagonal)
        return [Summand(t, symmetric and t is not self.trace) for t in self.tensors()]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Statistic:
        """The same statistic with other :meth:`tensors`."""
        count = len(self.value.tensors())
        trace = None if self.trace is None else tensors[count]
        return Statistic(self.value.with_tensors(tensors[:count]), self.kind, trace, self.part)

    def add_(self, other: Statistic) -> None:
        """Include more rows, of the same kind."""
        if self.kind != other.kind:
            raise ValueError(f"Statistic: expected more of {self.kind}, got {other.kind}")
        if self.columns is not None and other.columns is not None:
            X = torch.cat([self.columns, other.columns], -1)
            if are_few(X):
                self._held = X
                return
        torch._foreach_add_(self.tensors(), other.tensors())

    def scaled(self, weight: float | Tensor) -> Statistic:
        """``weight >= 0`` times the statistic."""
        if self.columns is not None:
            return Statistic(self.columns * weight**0.5)
        trace = None if self.trace is None else weight * self.trace
        return Statistic(self.value * weight, self.kind, trace, self.part)

    def mean(self) -> Tensor:
        """``tr(S) / n``, the mean eigenvalue of ``S [..., n, n]``."""
        X = self.columns
        if X is not None:
            return X.square().sum((-2, -1)) / max(X.shape[-2], 1)
        trace = self.value.trace() if self.trace is None else self.trace
        return trace / max(self.value.n if self.part is None else self.part.n, 1)


def are_few(X: Tensor) -> bool:
    """Whether ``X [..., n, R]`` and a product with it cost at most half of what ``X X^T`` does."""
    return 2 * X.shape[-1] <= X.shape[-2]


def side_by_side(statistics: Sequence[Statistic]) -> Statistic:
    """Statistics of one kind and structure along a new first dimension."""
    columns = [s.columns for s in statistics if s.columns is not None]
    if len(columns) == len(statistics) and len({X.shape for X in columns}) == 1:
        return Statistic(columns[0][None] if len(columns) == 1 else torch.stack(columns))
    first, *others = statistics
    if not others:
        return first.with_tensors([t[None] for t in first.tensors()])
    return first.with_tensors(
        [torch.stack(ts) for ts in zip(*(s.tensors() for s in statistics), strict=True)]
    )


class Summand(NamedTuple):
    """A tensor that is summed over ranks, and whether its last two dimensions are symmetric."""

    tensor: Tensor
    is_symmetric: bool

    def numel(self) -> int:
        """How many numbers are sent of it."""
        *batch, n = self.tensor.shape[:-1] if self.is_symmetric else (1, self.tensor.numel())
        return math.prod(batch) * (n * (n + 1) // 2 if self.is_symmetric else n)

    def sent(self) -> Tensor:
        """The numbers that are sent, a vector."""
        t = self.tensor
        return (pack_symmetric(t) if self.is_symmetric else t).flatten()

    def receive_(self, sent: Tensor) -> None:
        """Take such a vector over."""
        t = self.tensor
        if not self.is_symmetric:
            t.copy_(sent.view(t.shape))
            return
        n = t.shape[-1]
        unpack_symmetric(sent.view(*t.shape[:-2], n + 1 - n % 2, (n + 1) // 2), out=t)


@dataclass
class KroneckerStatistics:
    """Sums of both sides of a layer, with counts; normalized once, at the step."""

    input: Statistic
    grad: Statistic
    rows: int  # of the inputs
    samples: int = 0  # N, of the model
    loss_terms: int = 0  # counting every shared position of a sample
    is_summed: bool = False  # over ranks; counts are not
    is_elsewhere: bool = False  # on another rank, where the sums are
    is_last: bool = False  # these sums stand for those of all passes before, too

    def summands(self) -> list[Summand]:
        """All numbers of both sides, for sums over ranks."""
        return [*self.input.summands(), *self.grad.summands()]

    def stand_for_(self, times: float) -> None:
        """Make these sums those of so many times as many rows."""
        if times != 1:
            self.input, self.grad = (s.scaled(times) for s in (self.input, self.grad))
            self.rows = round(self.rows * times)

    def add_(self, other: KroneckerStatistics) -> None:
        """Include more rows and their counts; the last pass takes the place of the others."""
        if other.is_last:
            self.input, self.grad, self.rows = other.input, other.grad, 0
            self.is_elsewhere = other.is_elsewhere
        elif not self.is_elsewhere:
            self.input.add_(other.input)
            self.grad.add_(other.grad)
        self.rows += other.rows
        self.samples += other.samples
        self.loss_terms += other.loss_terms
