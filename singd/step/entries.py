"""Entries of factors in the optimizer's state: their names, their shapes, and what has no place."""

from __future__ import annotations

import operator
from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from singd.capture.weight_matrix import WeightMatrix
from singd.ops.storage import Form, recognize

State = MutableMapping[Any, dict[str, Any]]

GRAFT_NORM = "graft_norm"
"""The member of the state that :mod:`singd.step.grafting` writes for every matrix."""


def state_key(matrix: WeightMatrix, name: str) -> str:
    """The key of a member of ``matrix`` in the state of its weight."""
    return f"{matrix.label}.{name}" if matrix.label else name


def is_count(key: str) -> bool:
    """Whether an entry is a counter or a norm, whose data type is not the parameter's."""
    return key == "step" or key.rpartition(".")[2] == GRAFT_NORM


def are_same(value: Any, views: Sequence[Tensor]) -> bool:
    """Whether ``value`` is a list of these very tensors."""
    return (
        isinstance(value, list)
        and len(value) == len(views)
        and all(map(operator.is_, value, views))
    )


def drop(matrix: WeightMatrix, state: State, names: Iterable[str]) -> None:
    """Drop members of a matrix: of another structure, or of another rank."""
    for name in names:
        state.get(matrix.weight, {}).pop(state_key(matrix, name), None)


def drop_unknown(matrix: WeightMatrix, state: State, names: Iterable[str]) -> None:
    """Drop members that a matrix no longer has: momenta that were switched off."""
    entry = state.get(matrix.weight, {})
    known = {state_key(matrix, name) for name in names}
    prefix = f"{matrix.label}." if matrix.label else ""
    for key in [k for k, v in entry.items() if isinstance(v, list) and k not in known]:
        if key.startswith(prefix) and ("." in key) == bool(prefix):
            del entry[key]


def recognized(
    matrix: WeightMatrix, name: str, value: Any, shapes: Sequence[torch.Size]
) -> list[Form]:
    """The forms in which the state holds the tensors of a member, of these shapes.

    Raises:
        ValueError: If the value is no list of tensors that are stored of such a member.
    """
    good = isinstance(value, list | tuple) and all(isinstance(t, Tensor) for t in value)
    forms = recognize(value, shapes) if good else None
    if forms is None:
        expected = [list(shape) for shape in shapes]
        got = [list(t.shape) for t in value] if good else type(value).__name__
        raise ValueError(f"{matrix.name}: expected {name} of shapes {expected}, got {got}")
    return forms
