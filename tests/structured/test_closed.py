"""What is no algebra is noticed at its first product, once, whatever it is used within."""

import warnings

import pytest
import torch
from torch import Tensor

from structured import StructuredMatrix, Tied
from structured._core import closed
from tests.structured.algebras import ALGEBRAS, Series


@pytest.fixture(autouse=True)
def first_use():
    closed.forget()


class Symmetric(StructuredMatrix):
    """Closed under transposition, and not under multiplication."""

    M: Tensor
    closed_under_transpose = True

    @classmethod
    def zeros(cls, n, *, batch_shape=(), **opts):
        return cls(torch.zeros(*batch_shape, n, n, **opts))

    def to_dense(self):
        return self.M + self.M.mT


class Hollow(StructuredMatrix):
    """Closed, without the identity."""

    M: Tensor

    @classmethod
    def zeros(cls, n, *, batch_shape=(), **opts):
        return cls(torch.zeros(*batch_shape, n, n, **opts))

    def to_dense(self):
        return self.M.triu(1)


class Banded(StructuredMatrix):
    """With a projection of its own, so that only the product is a default."""

    M: Tensor

    @classmethod
    def zeros(cls, n, *, batch_shape=(), **opts):
        return cls(torch.zeros(*batch_shape, n, n, **opts))

    def to_dense(self):
        return self.M.tril(1)

    def orthogonal_project(self, M):
        return self._build([M.tril(1)])

    def project(self, S):
        return self._build([S.tril(1) + S.tril(-2)])


USES = {
    "A @ B": lambda A: A @ A,
    "inverse": lambda A: A.add_scaled_identity(9.0).inverse(),
    "exp": lambda A: A.exp(),
    "power": lambda A: A**3,
    "vmap": lambda A: torch.vmap(lambda t: A.with_tensors([t]).matmul(A).M)(A.M[None]),
    "jvp": lambda A: torch.func.jvp(lambda t: A.with_tensors([t]).matmul(A).M, (A.M,), (A.M,)),
    "compiled": lambda A: torch.compile(lambda A: A.matmul(A), fullgraph=True, backend="aot_eager")(
        A
    ),
    "in a nesting": lambda A: Tied(A, 2) @ Tied(A, 2),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("cls", [Symmetric, Banded])
def test_a_space_that_is_not_closed(cls, use):
    A = cls.zeros(4).randn_like(generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match=f"{cls.__name__} is no algebra: products") as record:
        USES[use](A)
    assert len([one for one in record if "algebra" in str(one.message)]) == 1
    USES[use](A)  # and not again
    cls.zeros(6) @ cls.zeros(6)


def test_a_space_without_the_identity():
    with pytest.warns(UserWarning, match="the identity is no member"):
        Hollow.zeros(5).add_scaled_identity(1.0)


def test_the_warning_is_about_the_line_that_multiplies():
    with pytest.warns(UserWarning, match="Banded is no algebra") as record:
        Banded.zeros(4) @ Banded.zeros(4)
    assert record[0].filename == __file__


def test_projections_alone_need_no_algebra():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Symmetric.zeros(4).project(torch.eye(4))
        Banded.zeros(4).project_gram(torch.ones(4, 2))


def test_nothing_is_said_of_algebras():
    for cls, sizes in ALGEBRAS.items():
        for n in sizes:
            A = cls.zeros(n).add_scaled_identity(2.0)
            for member in (A @ A, A.inverse(), A.exp()):
                assert member.layout == A.layout


def test_the_random_product_runs_once_for_each_size(monkeypatch):
    tried, missing = [], closed._missing
    monkeypatch.setattr(closed, "_missing", lambda *of: tried.append(of) or missing(*of))
    for n in (3, 5, 3, 5):
        for batch in ((), (2,)):
            A = Series.zeros(n, batch_shape=batch)
            _ = A @ A
    assert len(tried) == 2
