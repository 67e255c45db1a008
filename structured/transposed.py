"""The transpose of any structure: what ``A.mT`` is where a class has no name for it.

::

    A^T          as many numbers and the same costs as A
"""

from __future__ import annotations

from structured._core.matrix import Transposed
from structured._core.spec import Structure, StructureLike, composition, parse

__all__ = ["Transposed", "transposed"]


@composition
def transposed(structure: StructureLike) -> Structure:
    """``A^T`` for the members ``A`` of any structure; a member is a :class:`Transposed`."""
    return Structure(Transposed, (parse(structure),))
