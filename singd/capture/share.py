"""A share of the rows of a use, in place of all: sums over it, times how many it stands for.

Every row is taken with the same probability, so that these sums have those over all rows as their
mean (Horvitz and Thompson, JASA 47, 1952).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from singd.capture.statistics import KroneckerStatistics
from singd.layers import Layer


@dataclass
class Share:
    """Some rows of a use.

    Attributes:
        x: Their inputs.
        g: Their output gradients.
        every: How many rows each stands for.
        whole: Number of all rows, or of all samples where those are taken.
    """

    x: Tensor
    g: Tensor
    every: int
    whole: int

    def complete(self, sums: KroneckerStatistics) -> None:
        """Make sums over the share those over all rows."""
        sums.input, sums.grad = (s.scaled(float(self.every)) for s in (sums.input, sums.grad))
        sums.rows = self.count(sums.rows)

    def count(self, number: int) -> int:
        """A number of all rows, from that of the share."""
        return number * self.whole // max(len(self.x), 1)


def take(
    layer: Layer, approximation: str, x: Tensor, g: Tensor, every: int, phase: float
) -> Share | None:
    """Rows at equal distances, or samples where a layer reads them whole; ``None`` if all would be.

    Args:
        layer: Layer that reads them.
        approximation: ``"expand"`` or ``"reduce"``.
        x: Inputs, ``[N, ...]``.
        g: Output gradients, ``[N, ...]``.
        every: How many rows each row that is taken stands for.
        phase: Where to begin, uniform in [0, 1).
    """
    own = type(layer)
    are_rows = own.inputs is Layer.inputs and own.grads is Layer.grads
    if not layer.by_sample or (are_rows and x.ndim == 1):
        return None
    if are_rows and approximation == "expand" and x.ndim > 2:
        x, g = x.flatten(0, -2), g.flatten(0, -2)
    every, whole = min(every, len(x)), len(x)
    if every <= 1:
        return None
    some = slice(int(phase * every), None, every)
    return Share(x[some], g[some], every, whole)
