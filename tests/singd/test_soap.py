"""SOAP against dense formulas: bases, moments that follow them, directions."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from singd import SOAP
from singd.methods.soap import MovingMoments, TrackedBasis, in_bases, iterated
from structured import Dense, Diagonal, Kronecker, Rotated

OPTIONS: dict[str, Any] = {"beta2": 0.8, "basis_interval": 3, "damping": 1e-3, "max_dim": 100}

shapes = st.lists(st.integers(1, 5), min_size=2, max_size=3).map(tuple)
seeds = st.integers(0, 10_000)


def fresh(shape: tuple[int, ...], count: int, **options: Any) -> MovingMoments:
    method, given = TrackedBasis(), OPTIONS | options
    like: dict[str, Any] = {"dtype": torch.float64, "device": "cpu", "batch_shape": (count,)}
    return method.init(shape, method.structures("", shape, None, given), given, **like)


def gradients(shape: tuple[int, ...], count: int, seed: int) -> list[Tensor]:
    made = torch.Generator().manual_seed(seed)
    like: dict[str, Any] = {"dtype": torch.float64, "generator": made}
    scales = [torch.randn(n, n, **like) for n in shape]
    drawn = [torch.randn(count, *shape, **like) for _ in range(6)]
    return [in_bases([Dense(M.expand(count, *M.shape)) for M in scales], G) for G in drawn]


def dense(Q: Any, i: int) -> Tensor:
    return functools.reduce(torch.kron, [member.to_dense()[i] for member in Q])


@given(shape=shapes, seed=seeds, count=st.integers(1, 3))
def test_against_dense_formulas(shape: tuple[int, ...], seed: int, count: int) -> None:
    method, factors = TrackedBasis(), fresh(shape, count)
    covariances: list[Tensor] = []
    moments = [torch.zeros(0)] * count
    for step, G in enumerate(gradients(shape, count, seed)):
        before, factors = factors, method.update(factors, G, OPTIONS, step)
        beta = OPTIONS["beta2"] if step else 0.0
        news = []
        for mode, n in enumerate(shape):
            X = G.movedim(mode + 1, 1).flatten(2)
            news.append(X @ X.mT * n / G[0].numel())
        covariances = [
            beta * old + (1 - beta) * new
            for old, new in zip(covariances or news, news, strict=True)
        ]
        for S, expected, Q in zip(factors.S, covariances, factors.Q, strict=True):
            torch.testing.assert_close(S.to_dense(), expected, rtol=1e-10, atol=1e-10)
            eye = torch.eye(Q.n, dtype=torch.float64).expand(count, -1, -1)
            torch.testing.assert_close((Q.mT @ Q).to_dense(), eye, rtol=0, atol=1e-12)
        for i in range(count):
            old, new = dense(before.Q, i), dense(factors.Q, i)
            turned = new.mT @ old
            V = turned.square() @ moments[i] if step else torch.zeros(len(new)).double()
            moments[i] = beta * V + (1 - beta) * (new.mT @ G[i].flatten()).square()
            torch.testing.assert_close(factors.V.d[i], moments[i], rtol=1e-9, atol=1e-9)
            D = method.precondition(factors, G, method.products(factors, OPTIONS))[i].flatten()
            root = (moments[i] + OPTIONS["damping"] * moments[i].mean()).sqrt()
            torch.testing.assert_close(D, new @ ((new.mT @ G[i].flatten()) / root))


@given(shape=shapes, seed=seeds)
def test_moments_follow_their_basis_as_a_rotated_matrix_does(
    shape: tuple[int, ...], seed: int
) -> None:
    """Where no new moment counts, V is what :meth:`structured.Rotated.rebase` gives."""
    method, factors = TrackedBasis(), fresh(shape, 1)
    first, second, *_ = gradients(shape, 1, seed)
    before = method.update(factors, first, OPTIONS, 0)
    still = OPTIONS | {"beta2": 1.0}  # for this test alone: averages stay
    moved = method.update(before, second, still, 0)
    old, new = (Kronecker(*(Dense(Q.to_dense()[0]) for Q in f.Q)) for f in (before, moved))
    expected = Rotated(Diagonal(before.V.d[0]), old).rebase(new)
    assert isinstance(expected.A, Diagonal)
    torch.testing.assert_close(moved.V.d[0], expected.A.d, rtol=1e-9, atol=1e-9)


@given(seed=seeds)
def test_bases_find_the_eigenvectors(seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(5, 5, generator=made, dtype=torch.float64))[0]
    values = torch.tensor([16.0, 8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    Q = Dense(torch.eye(5, dtype=torch.float64))
    for _ in range(120):
        Q = iterated(Dense(U * values @ U.mT), Q, 0.0)
    found = (Q.mT @ Dense(U * values @ U.mT) @ Q).to_dense()
    off = found - torch.diag(found.diagonal())
    assert float(off.abs().max()) < 1e-6
    torch.testing.assert_close(found.diagonal().sort().values, values.flip(0), rtol=1e-6, atol=0)


def test_a_wide_dimension_has_no_basis() -> None:
    model = nn.Linear(6, 3, bias=False).double()
    optimizer = SOAP(model, max_dim=4)
    model(torch.randn(8, 6).double()).square().mean().backward()
    optimizer.step()
    members = optimizer.state[model.weight].items()
    sizes = {k: [list(t.shape) for t in v] for k, v in members if isinstance(v, list)}
    assert sizes["Q_0"] == [[3, 3]]
    assert sizes["Q_1"] == [[]]
    assert sizes["V"] == [[18]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta2": 1.0}, r"beta2: expected a number in \[0, 1\), got 1.0"),
        ({"basis_interval": 0}, "basis_interval: expected an integer >= 1, got 0"),
        ({"max_dim": -1}, "max_dim: expected an integer >= 0, got -1"),
    ],
)
def test_errors_say_what_was_expected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SOAP(nn.Linear(2, 2), **options)
