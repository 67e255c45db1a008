"""Factors of which each rank has some rows: what belongs to the whole is a sum over the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from singd.ops.reference import Indices
from structured import BlockDiagonal, Diagonal, ScaledIdentity, StructuredMatrix


@dataclass(frozen=True, eq=False)
class Part:
    """Neighbouring rows of a diagonal or block-diagonal factor, whole blocks of it.

    Attributes:
        side: Side of the factor, ``"input"`` or ``"grad"``.
        group: Process group of the ranks that share the factor.
        ends: Where the rows of each rank end.
        rank: Number of this rank.
        tail: How many of the last ones this rank has besides, which it does not count.
        is_scattered: Whether a rank sums statistics of all rows, and then has those of its own.
    """

    side: str
    group: Any
    ends: tuple[int, ...]
    rank: int
    tail: int = 0
    is_scattered: bool = False

    @property
    def n(self) -> int:
        """Number of all rows."""
        return self.ends[-1]

    @property
    def last(self) -> int:
        """The rank that has the last of them."""
        return self.ends.index(self.n)

    @property
    def rows(self) -> slice:
        """Those of this rank."""
        return slice(self.ends[self.rank - 1] if self.rank else 0, self.ends[self.rank])

    @property
    def own(self) -> int:
        """How many rows this rank counts, the first ones."""
        return self.rows.stop - self.rows.start

    @property
    def size(self) -> int:
        """How many rows this rank has."""
        return self.own + self.tail

    def of(self, M: Any) -> Any:
        """What this rank has of a member, views unless there is a tail."""
        return within(M, self.rows, self.tail)

    def counted(self, M: Any) -> Any:
        """The part of a member of this part that this rank counts."""
        return within(M, slice(0, self.own)) if self.tail else M

    def indices(self, M: Any) -> list[Indices]:
        """Where the numbers of :meth:`of` lie in each of the tensors of a member."""
        k = mixed_rows(M) or 1
        begin, width = self.rows.start // k, self.own // k
        runs = 1 if isinstance(M, Diagonal) else k * k
        found = Indices(begin * runs)
        if self.tail and width and self.n % k == 0:  # the last rows lie in the same tensor
            found = Indices(begin * runs, width * runs, (self.n // k - 1 - begin) * runs)
        return [found] if isinstance(M, Diagonal) else [found, Indices()]


def mean(M: StructuredMatrix, part: Part | None) -> Tensor:
    """``tr(M) / n`` of the whole, ``[...]``."""
    if part is None:
        return M.trace() / max(M.n, 1)
    return completed([part.counted(M).trace()], [part])[0] / part.n


def norm(M: StructuredMatrix, part: Part | None) -> Tensor:
    """The Frobenius norm of the whole, ``[...]``."""
    if part is None:
        return M.frobenius_norm()
    return completed([part.counted(M).frobenius_norm().square()], [part])[0].sqrt()


def max_abs(M: StructuredMatrix, part: Part | None) -> Tensor:
    """The largest absolute value in the whole, ``[...]``."""
    found = M.max_abs()
    if part is not None:
        dist.all_reduce(found, dist.ReduceOp.MAX, group=part.group)
    return found


def completed(numbers: Sequence[Tensor], parts: Sequence[Part | None]) -> list[Tensor]:
    """The sums of numbers over the ranks that share a factor, by one reduction for each group.

    Args:
        numbers: Tensors, each of what this rank counts of its part.
        parts: Those parts; where there is none a tensor is returned as it is.
    """
    out = list(numbers)
    groups = {part.group: None for part in parts if part is not None}
    for group in groups:
        some = [i for i, part in enumerate(parts) if part is not None and part.group is group]
        flat = torch.cat([out[i].flatten().double() for i in some])
        dist.all_reduce(flat, group=group)
        pieces = flat.split([out[i].numel() for i in some])
        for i, piece in zip(some, pieces, strict=True):
            out[i] = piece.view(out[i].shape).to(out[i].dtype)
    return out


def mixed_rows(C: StructuredMatrix) -> int | None:
    """How many rows of X are mixed in ``C X``, block by block; ``None`` for others than blocks."""
    if isinstance(C, Diagonal | ScaledIdentity):
        return 1
    return C.blocks.shape[-1] if isinstance(C, BlockDiagonal) else None


def within(C: Any, rows: slice, tail: int = 0) -> Any:
    """The part of C that multiplies some rows of X, which are whole blocks; views without a tail.

    Args:
        C: Member of which :func:`mixed_rows` knows.
        rows: First and last of the rows.
        tail: How many of the last rows of all come after them.
    """
    if isinstance(C, ScaledIdentity):
        return ScaledIdentity(C.c, rows.stop - rows.start + tail)
    if isinstance(C, Diagonal):
        d = C.d[..., rows]
        return Diagonal(torch.cat([d, C.d[..., C.n - tail :]], -1) if tail else d)
    count, k = C.blocks.shape[-3:-1]
    blocks = C.blocks[..., rows.start // k : min(rows.stop // k, count), :, :]
    if tail and not C.last.shape[-1]:
        blocks = torch.cat([blocks, C.blocks[..., count - tail // k :, :, :]], -3)
    has_last = bool(tail) or rows.start <= count * k < rows.stop
    return BlockDiagonal(blocks, C.last if has_last else C.last[..., :0, :0])
