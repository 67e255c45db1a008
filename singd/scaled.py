"""Diagonal factors only scale the rows and columns of a gradient, so nothing made of it is kept.

A preconditioned gradient is needed twice: for the bound of the step, and for the step. On a CPU to
make it twice, in memory that stays in the processor's caches, takes less time than to write it out
and read it back. Plain twin: :func:`singd.update.precondition_products`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from singd.grouping import Columns
from singd.update import precondition_products
from structured import Diagonal

PIECE = 1 << 18  # numbers at a time, but at least one weight
CACHES = 1 << 23  # bytes of weights that a processor holds together with what is made of them


class Scaled:
    """``C C^T G K K^T`` of equal weights, for diagonal ``K K^T`` and ``C C^T``.

    Args:
        of: The weights.
        KK: ``[units, ..., d_in, d_in]``, the bias counted as one more input.
        CC: ``[units, ..., d_out, d_out]``.
    """

    def __init__(self, of: Columns, KK: Diagonal, CC: Diagonal) -> None:
        self.of, self.KK, self.CC = of, KK, CC
        self.d_in = KK.n - (of.units[0].bias is not None)
        self.dtype = torch.promote_types(KK.dtype, torch.float32)
        self.columns = KK.d[..., None, : self.d_in].to(self.dtype)
        self.rows = CC.d[..., None].to(self.dtype)
        self.gradients = of.matrices()
        squares = [torch.dot(root, root) for root in self._roots()]
        self.quadratic = torch.stack(squares).sum()  # <C C^T G K K^T, G> = ||C^T G K||^2

    def whole(self) -> Tensor:
        """All at once, ``[units, ..., d_out, d_in]``."""
        KK, CC = Diagonal(self.columns.squeeze(-2)), Diagonal(self.rows.squeeze(-1))
        return precondition_products(KK, CC, torch.stack(self.gradients).to(self.dtype))

    def biases(self, g: Tensor) -> Tensor:
        """The same for the biases that go with the weights, ``g [units, ..., d_out, 1]``."""
        return precondition_products(Diagonal(self.KK.d[..., self.d_in :]), self.CC, g)

    def moves(self, nu: Tensor) -> Iterator[list[tuple[nn.Parameter, Tensor]]]:
        """Parameters with their preconditioned gradients times ``nu``, a few at a time.

        What came before is overwritten by what comes next.
        """
        for here, made in self._made(self.columns, self.rows * nu.to(self.dtype)):
            yield self.of._replace(units=self.of.units[here]).moves(made)

    def _roots(self) -> Iterator[Tensor]:
        return (made.view(-1) for _, made in self._made(self.columns.sqrt(), self.rows.sqrt()))

    def _made(self, columns: Tensor, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Gradients with their columns and rows scaled, some units at a time in the same memory."""
        shape = torch.Size((*rows.shape[1:-1], self.d_in))
        count = min(len(rows), max(1, PIECE // max(1, shape.numel())))
        room = torch.empty(count, *shape, dtype=self.dtype)
        for start in range(0, len(rows), count):
            here = slice(start, start + count)
            gradients = self.gradients[here]
            made = room[: len(gradients)]
            if count == 1 and gradients[0].dtype == self.dtype:
                torch.mul(gradients[0], columns[start], out=made[0])
            else:
                torch._foreach_copy_(made.unbind(), gradients)
                made.mul_(columns[here])
            yield here, made.mul_(rows[here])
