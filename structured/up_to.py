"""A structure for small sizes and another for large ones: a limit of memory and time.

::

    A   n <= limit
    B   n > limit       as many numbers and the same costs as A, or B
"""

from __future__ import annotations

from typing import Any

from structured._core.matrix import StructuredMatrix
from structured._core.spec import Structure, StructureLike, composition, is_size, parse


class _UpTo:
    """Factory of members of one of two structures."""

    __name__ = "up_to"

    def __reduce__(self) -> str:
        return "_FACTORY"  # copies are the same, or structures made of them would differ

    @staticmethod
    def choose(n: int, limit: int, structure: Structure, beyond: Structure) -> Structure:
        """The structure of members of size ``n``."""
        return (structure if n <= limit else beyond).at(n)

    def __call__(
        self, n: int, limit: int, structure: Structure, beyond: Structure, **kwargs: Any
    ) -> StructuredMatrix:
        return self.choose(n, limit, structure, beyond)(n, **kwargs)


_FACTORY = _UpTo()


@composition
def up_to(limit: int, structure: StructureLike, beyond: StructureLike) -> Structure:
    """``structure`` for sizes up to ``limit``, ``beyond`` for larger ones.

    Members are those of the two structures: ``up_to(8192, dense, diagonal)`` gives a
    :class:`Dense` or a :class:`Diagonal`, and :meth:`Structure.at` says which structure it is.

    Raises:
        ValueError: If ``limit`` is not a non-negative integer.
    """
    if not is_size(limit):
        raise ValueError(f"up_to(limit, ...): expected an integer >= 0, got {limit!r}")
    return Structure(_FACTORY, (limit, parse(structure), parse(beyond)))
