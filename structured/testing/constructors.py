"""The law of constructors: what they accept is a member.

Written as in ``laws.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from torch import Tensor

from structured._core.matrix import StructuredMatrix
from structured._core.stored import Stored


def constructors(A: StructuredMatrix) -> None:
    """Tensors of shapes that do not fit are an error, which says what was expected.

    One stored tensor at a time has another shape. Where that is accepted, it has to be a member of
    another size or batch shape, one that is read back from its dense matrix. Of structures that say
    ``dimensions`` or have a ``__post_init__`` of their own, and whose parts do; others take what
    they are given.
    """
    if not _checks_shapes(A):
        return
    tensors = list(A.tensors())
    for i, t in enumerate(tensors):
        for changed in _reshaped(t):
            given = [*tensors[:i], changed, *tensors[i + 1 :]]
            shapes = [list(each.shape) for each in given]
            try:
                made = A.with_tensors(given)
            except ValueError as error:
                said = str(error)
                clear = "expected" in said and "got" in said
                assert clear, f"{shapes}: unclear message {said!r}"
                continue
            found = _fault(made)
            assert found is None, f"a constructor accepts {shapes}: {found}"


def _checks_shapes(A: StructuredMatrix) -> bool:
    stored = [f for f in fields(A) if not f.metadata.get("static")]
    parts = [getattr(A, f.name) for f in stored if not isinstance(getattr(A, f.name), Tensor)]
    own = A.dimensions or type(A).__post_init__ is not Stored.__post_init__
    return bool(own or len(parts) == len(stored)) and all(map(_checks_shapes, parts))


def _reshaped(t: Tensor) -> Iterator[Tensor]:
    """``t`` with a dimension more, one less, and a place more or less along each."""
    shapes: list[tuple[int, ...]] = [(2, *t.shape), (*t.shape, 1)]
    for dim, size in enumerate(t.shape):
        front, rest = t.shape[:dim], t.shape[dim + 1 :]
        shapes += [(*front, *rest), (*front, size + 1, *rest)]
        shapes += [(*front, size - 1, *rest)] if size else []
    for shape in shapes:
        yield t.new_ones(shape)


def _fault(made: StructuredMatrix) -> str | None:
    """Why this is no member, if it is none."""
    try:
        batch = made.shape[:-2]
        for t in made.tensors():
            if t.shape[: len(batch)] != batch:
                return f"the batch shape is {list(batch)}, and a tensor has {list(t.shape)}"
        dense = made.to_dense()
        again = made.orthogonal_project(dense)
    except (RuntimeError, ValueError, IndexError) as error:
        return f"{type(error).__name__}: {error}"
    if dense.shape != made.shape or dense.shape[-1] != dense.shape[-2]:
        return f"the shape is {list(made.shape)}, that of the dense matrix {list(dense.shape)}"
    if again.layout != made.layout:
        return f"{made!r} reads back from its dense matrix as {again!r}"
    return None
