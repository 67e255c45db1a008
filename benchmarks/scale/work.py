"""What SINGD computes for one weight: its own code, run on shapes without data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.scale.models import Assumptions, Matrix
from singd import SINGD
from singd.capture.statistics import Columns, Side, Statistic, side_by_side
from singd.layers import find_layer
from singd.methods.base import Averages, Stack
from singd.methods.inverse_free import InverseFree
from singd.ops.parts import within
from structured.costs import CUBIC, PRODUCTS, SOLVES
from structured.costs import work as cost_of

ROWS = 1024  # of which statistics are made


@dataclass(frozen=True)
class Work:
    """Multiply-adds of products, and numbers read or written by everything else."""

    products: float = 0.0
    moved: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.products + other.products, self.moved + other.moved)

    def __mul__(self, times: float) -> Work:
        return Work(self.products * times, self.moved * times)

    def seconds(self, given: Assumptions) -> float:
        """Two operations for a multiply-add; four bytes read and four written for a number."""
        return 2 * self.products / given.speed + 8 * self.moved / given.memory


class Counter(TorchDispatchMode):
    """Adds up the work of every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if "c10d" not in func.namespace:
            amount = cost_of(func, args, out)
            is_product = name in {*PRODUCTS, *CUBIC, *SOLVES} or name.startswith("_fft")
            self.work += Work(amount, 0.0) if is_product else Work(0.0, amount)
        return out


def counted(function: Callable[[], Any]) -> tuple[Any, Work]:
    """What a function returns, and its work."""
    with torch.no_grad(), Counter() as counter:
        out = function()
    return out, counter.work


@dataclass(frozen=True)
class Factors:
    """What the factors of one weight need.

    Attributes:
        stored: Numbers in factors.
        cached: Numbers in the products that are kept between updates.
        statistics: Numbers in statistics.
        sent: Those of them that are sent: one half of symmetric matrices.
        sent_grad: Those of output gradients.
        row: Work for one token, in the statistics.
        update: Work of an update.
        apply: Work of a direction.
        mixed_rows: How many neighbouring rows a direction mixes; ``None`` for all.
        needs_factors: Whether statistics are not summed without the factors.
        separable: How many rows are whole blocks of the output factor; ``None`` if ranks have all.
        statistics_grad: Numbers in the statistics of output gradients.
    """

    stored: int
    cached: int
    statistics: int
    sent: int
    sent_grad: int
    row: Work
    update: Work
    apply: Work
    mixed_rows: int | None
    needs_factors: bool
    separable: int | None
    statistics_grad: int


def factors_of(
    matrix: Matrix, options: dict[str, Any], dtype: torch.dtype, rows: int | None = None
) -> Factors:
    """By the method itself, on the meta device.

    Args:
        matrix: Weight.
        options: Options of :class:`singd.SINGD` that are not its defaults.
        dtype: Data type of the factors.
        rows: Number of rows of which a rank has the output factor; all if ``None``.
    """
    method, shape = InverseFree(), (matrix.rows, matrix.columns)
    given = dict(SINGD(nn.Linear(2, 2)).defaults) | options
    module = nn.Linear(matrix.columns, matrix.rows, bias=False, device="meta")
    layer = find_layer(module)
    assert layer is not None
    structures = method.structures(matrix.name, shape, layer.input_structure, given)
    like: dict[str, Any] = {"dtype": dtype, "device": "meta"}
    one = method.init(shape, structures, given, **like)

    def seen(side: Side, n: int) -> Any:
        values = torch.empty(ROWS, n, **like)
        columns = Columns(layer, module, side, values, "expand", False, (n,))
        statistic = method.summarize(one, side, columns, given)
        statistic.tensors()  # a GPU has more tokens than make it worth while to wait with the sum
        return statistic

    both, seen_rows = counted(lambda: (seen("input", matrix.columns), seen("grad", matrix.rows)))
    stack = method.init(shape, structures, given, batch_shape=(1,), **like)
    separable = method.separable(one, "grad", given, whole=True)
    if rows is not None:
        side = slice(0, rows)
        one, stack = (replace(f, C=within(f.C, side)) for f in (one, stack))
        both = both[0], Statistic(within(both[1].value, side), both[1].kind, both[1].trace)
        shape = (rows, matrix.columns)
    averages = Averages(side_by_side([both[0]]), side_by_side([both[1]]))

    def update() -> Any:
        before = Stack(stack, averages, method.products(stack, given))
        (new,) = method.update_all([before], given, 1)
        return new, method.products(new, given)

    _, first = counted(lambda: method.products(stack, given))
    (new, products), updated = counted(update)
    G = torch.empty(1, *shape, **like)
    _, applied = counted(lambda: method.precondition(new, G, products))
    return Factors(
        stored=sum(t.numel() for m in one.members().values() for t in m.tensors()),
        cached=sum(t.numel() for p in products.values() for t in p.tensors()),
        statistics=sum(t.numel() for s in both for t in s.tensors()),
        sent=sum(s.numel() for each in both for s in each.summands()),
        sent_grad=sum(s.numel() for s in both[1].summands()),
        row=seen_rows * (1 / ROWS),
        update=updated + first * -1.0,
        apply=applied,
        mixed_rows=method.mixed_rows(one),
        needs_factors=method.needs_factors(one, given),
        separable=separable,
        statistics_grad=sum(t.numel() for t in both[1].tensors()),
    )


def sampled(factors: Factors, share: float) -> Factors:
    """The same with statistics of a share of the tokens."""
    return replace(factors, row=factors.row * share)
