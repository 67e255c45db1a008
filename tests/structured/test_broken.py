"""Structures broken on purpose: each fails exactly the laws that it breaks."""

import re

import numpy as np
import pytest
import torch
from torch import Tensor

from structured import Diagonal, StructuredMatrix, parse
from structured.testing import LAWS, check
from structured.testing.mistakes import _mistakes
from tests.structured.broken import Affine, GramOfTheTranspose, Traceless
from tests.structured.broken_members import BROKEN  # those of all four
from tests.structured.specs import COMPILING

# What is no algebra at all fails more than these.
AT_LEAST = {
    Traceless: {"identity", "add_scaled_identity", "project_trace"},
    Affine: {"linear", "zeros"},
}


def failing(structure, laws, examples=20):
    found = set()
    for law in laws:
        try:
            check(structure, laws=[law], sizes=range(5), examples=examples, shrink=False)
        except AssertionError:
            found.add(law)
    return found


@pytest.mark.parametrize("cls", BROKEN)
def test_exactly_the_broken_laws_fail(cls):
    rest = LAWS.keys() - BROKEN[cls] - {*COMPILING}  # which are slow
    assert failing(cls, BROKEN[cls]) | failing(cls, rest, examples=3) == BROKEN[cls]


@pytest.mark.parametrize("cls", AT_LEAST)
def test_what_is_no_algebra_fails_more(cls):
    assert failing(cls, AT_LEAST[cls]) == AT_LEAST[cls]


def test_every_law_can_fail():
    assert LAWS.keys() == set().union(*BROKEN.values(), *AT_LEAST.values())


def test_a_failure_is_named():
    with pytest.raises(AssertionError) as caught:
        check(GramOfTheTranspose)
    said = str(caught.value)
    assert "law 'gram' fails for gram_of_the_transpose" in said
    assert "A = GramOfTheTranspose(2; M: 2 x 2) [float64]" in said  # the smallest there is


# Mistakes: for each a class that returns a member where it should raise -------------------------


def of_tensor(accepts):
    return lambda A, X: isinstance(X, Tensor) and accepts(A, X)


def of_members(accepts):
    return lambda A, B: isinstance(B, StructuredMatrix) and accepts(A, B)


WRONG = {
    "one row more": of_tensor(lambda A, X: X.ndim == 2 and X.shape[0] == A.n + 1),
    "one dimension": of_tensor(lambda A, X: X.ndim == 1),
    "float32": of_tensor(lambda A, X: X.dtype == torch.float32),
    "meta numbers": of_tensor(lambda A, X: X.is_meta),
    "an array": lambda A, X: isinstance(X, np.ndarray),
    "None": lambda A, X: X is None,
}
WRONG_COLUMNS = {"another batch": of_tensor(lambda A, X: X.ndim == 3)} | WRONG
WRONG_SQUARES = {"one column more": of_tensor(lambda A, X: X.shape[-1] == A.n + 1)} | WRONG
OF_TENSORS = {
    "apply": WRONG_COLUMNS,
    "apply_transpose": WRONG_COLUMNS,
    "solve": WRONG_COLUMNS,
    "project": WRONG_SQUARES,
    "orthogonal_project": WRONG_SQUARES,
    "project_gram": WRONG,
    "orthogonal_project_gram": WRONG,
}
OF_MEMBERS = {
    "A @ B": "__matmul__",
    "A.matmul(B)": "matmul",
    "tr(A B)": "trace_product",
    "A + B": "__add__",
    "A - B": "__sub__",
}
WRONG_MEMBERS = {
    "batch shape": of_members(lambda A, B: B.batch_shape != A.batch_shape),
    "structure": of_members(lambda A, B: type(B) is not type(A)),
    "dtype": of_members(lambda A, B: B.dtype != A.dtype),
    "device": of_members(lambda A, B: B.device != A.device),
    "size": of_members(lambda A, B: B.n != A.n),
}
OF_SCALARS = {"A * c": "__mul__", "A / c": "__truediv__", "A + c I": "add_scaled_identity"}
WRONG_SCALARS = {
    "one c too many": of_tensor(lambda A, c: c.ndim),
    "c meta": of_tensor(lambda A, c: c.is_meta),
    "c complex": of_tensor(lambda A, c: c.is_complex()),
}
FORGIVEN = {
    **{f"{m} of {w}": (m, accepts) for m in OF_TENSORS for w, accepts in OF_TENSORS[m].items()},
    **{
        f"{name} of another {what}": (method, accepts)
        for name, method in OF_MEMBERS.items()
        for what, accepts in WRONG_MEMBERS.items()
    },
    **{
        f"{name}, {what}": (method, accepts)
        for name, method in OF_SCALARS.items()
        for what, accepts in WRONG_SCALARS.items()
    },
    "A.matmul(B) of a tensor": ("matmul", of_tensor(lambda A, B: True)),
    "tr(A B) of a tensor": ("trace_product", of_tensor(lambda A, B: True)),
    "c * A, one c too many": ("__rmul__", WRONG_SCALARS["one c too many"]),
    "A + c I, c a list": ("add_scaled_identity", lambda A, c: isinstance(c, list)),
    "A + 1": ("__add__", lambda A, other: type(other) is int),
    "A * A": ("__mul__", lambda A, other: isinstance(other, Diagonal)),
    "with_tensors, one too many": ("with_tensors", lambda A, tensors: len(tensors) > 1),
}


def forgiving(method, accepts):
    """Diagonal matrices whose ``method`` returns a member where ``accepts(A, argument)``."""

    class Forgiving(Diagonal):
        def __matmul__(self, other):
            return Diagonal(self.d) @ other  # strict, whatever becomes of matmul

    strict = getattr(Diagonal, method)

    def lenient(self, argument):
        return self if accepts(self, argument) else strict(self, argument)

    setattr(Forgiving, method, lenient)  # what a class's body defines has its arguments checked
    return Forgiving


@pytest.mark.parametrize("mistake", FORGIVEN)
def test_no_mistake_is_forgiven(mistake):
    with pytest.raises(AssertionError, match=re.escape(f"{mistake}: expected an error, got")):
        check(forgiving(*FORGIVEN[mistake]), laws=["errors"], sizes=[0, 2, 3], shrink=False)


def test_every_mistake_has_its_class():
    structure = parse("diagonal")
    A, other = (structure(n, batch_shape=(2,), dtype=torch.float64) for n in (3, 4))
    seen = {"zeros in torch.int64", "zeros in torch.complex64"}  # by a class of broken_conduct
    assert {name for name, _ in _mistakes(structure, other, A)} == FORGIVEN.keys() | seen
