"""SOAP in few directions: what its formulas give with whole bases and means, and what it stores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from singd import SOAP
from singd.methods.spiked import SpikedBasis, rebased, turned
from singd.testing import check_method
from structured import parse

F64 = torch.float64
SHAPES = st.lists(st.integers(1, 5), min_size=2, max_size=3).map(tuple)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def options_of(**given: Any) -> dict[str, Any]:
    return {"beta2": 0.9, "damping": 1e-3, "T": 1, **given}


def completed(Q: Tensor) -> Tensor:
    """An orthogonal matrix ``[n, n]`` that begins with the columns of ``Q [n, r]``."""
    n, r = Q.shape
    whole = torch.linalg.qr(torch.cat([Q, torch.eye(n, dtype=Q.dtype)], 1)).Q
    return torch.cat([Q, whole[:, r:n]], 1)


def in_bases(bases: list[Tensor], G: Tensor) -> Tensor:
    for i, Q in enumerate(bases):
        G = torch.tensordot(Q.mT, G, ([1], [i])).movedim(0, i)
    return G


def meaned(V: Tensor, ranks: list[int]) -> Tensor:
    """Beyond the first entries of every mode, the mean."""
    for i, r in enumerate(ranks):
        if V.shape[i] > r:
            first, rest = V.split([r, V.shape[i] - r], i)
            V = torch.cat([first, rest.mean(i, keepdim=True).expand_as(rest)], i)
    return V


@given(shape=SHAPES, rank=st.integers(1, 5), seed=st.integers(0, 99))
def test_it_is_soap_in_a_whole_basis_with_means_in_place_of_moments(
    shape: tuple[int, ...], rank: int, seed: int
) -> None:
    """Three steps beside dense bases, dense averages of rank r, and moments of all directions."""
    method, options = SpikedBasis(), options_of(rank=rank)
    structures = method.structures("w", shape, None, options)
    factors = method.init(shape, structures, options, batch_shape=(1,), dtype=F64, device="cpu")
    ranks = [min(rank, n) for n in shape]
    bases = [torch.eye(n, dtype=F64) for n in shape]
    V = torch.zeros(shape, dtype=F64)
    for step in range(3):
        G = draw(seed + step, *shape)
        new = method.update(factors, G[None], options, step)
        for i, (n, r) in enumerate(zip(shape, ranks, strict=True)):
            X = G.movedim(i, 0).flatten(1)
            old, L = factors.Q[i].to_dense()[0][:, :r], factors.L[i].to_dense()[0]
            w = 1.0 if step == 0 else 0.1
            M = (1 - w) * old @ L @ old.mT + w * X @ X.mT * (n / G.numel())
            Q = new.Q[i].to_dense()[0][:, :r]
            torch.testing.assert_close(Q.mT @ Q, torch.eye(r, dtype=F64))
            mean = (old.mT @ M @ old).trace() / r
            iterated = (M + 1e-3 * mean * torch.eye(n, dtype=F64)) @ old
            torch.testing.assert_close(Q @ (Q.mT @ iterated), iterated)  # of the same span
            torch.testing.assert_close(new.L[i].d[0], (Q.mT @ M @ Q).diagonal())
            before, bases[i] = bases[i], completed(Q)
            R = (bases[i].mT @ before).square()
            V = torch.tensordot(R, V, ([1], [i])).movedim(0, i)
            V = meaned(V, ranks)
        square = meaned(in_bases(bases, G).square(), ranks)
        V = square if step == 0 else 0.9 * V + 0.1 * square
        turned_G = in_bases(bases, G) / (V + 1e-3 * V.mean()).sqrt()
        expected = in_bases([Q.mT for Q in bases], turned_G)
        D = method.precondition(new, G[None], method.products(new, options))[0]
        torch.testing.assert_close(D, expected, rtol=1e-6, atol=1e-8)
        factors = new


def test_directions_of_a_spiked_covariance_are_found() -> None:
    """Of noise with three strong directions, the three; other directions keep the noise's mean."""
    strong = torch.linalg.qr(draw(0, 30, 3)).Q
    Q, L = torch.eye(30, dtype=F64)[None, :, :3], torch.zeros(1, 3, dtype=F64)
    for step in range(300):
        X = 5 * strong @ draw(2 * step + 1, 3, 40) + draw(2 * step + 2, 30, 40)
        L, Q = turned(L, Q, X[None], 0.9, 1e-6)
    assert float((strong.mT @ Q[0]).square().sum()) > 2.9
    torch.testing.assert_close(L, torch.full_like(L, 40 * 26.0), rtol=0.3, atol=0.0)


@given(n=st.integers(1, 6), seed=st.integers(0, 99), data=st.data())
def test_the_sum_of_all_moments_stays_when_a_basis_turns(
    n: int, seed: int, data: st.DataObject
) -> None:
    r = data.draw(st.integers(1, n))
    old, new = (torch.linalg.qr(draw(seed + i, 1, n, r)).Q for i in range(2))
    v = draw(seed, 1, r + 1, 2).square()
    v[:, r:] *= n > r  # no directions, no moment
    count = torch.tensor([1.0] * r + [float(n - r)], dtype=F64)
    torch.testing.assert_close(count @ rebased(v, old, new), count @ v)
    torch.testing.assert_close(rebased(v, old, old), v)


@pytest.mark.parametrize("rank", [1, 3, 100])
def test_it_keeps_what_every_method_keeps(rank: int) -> None:
    check_method(lambda model, params: SOAP(model, params, T=2, rank=rank))


def test_it_stores_a_few_directions() -> None:
    model = nn.Linear(200, 100, bias=False)
    optimizer = SOAP(model, rank=4, momentum=0.0)
    model(torch.randn(8, 200)).square().mean().backward()
    optimizer.step()
    (row,) = optimizer.plan().rows
    tensors = (t for name, ts in optimizer.state[model.weight].items() for t in ts)
    assert sum(t.nbytes for t in tensors) == row.state_bytes == 4 * (4 * 300 + 2 * 4 + 5 * 5)
    assert row.structures == "leading_columns(4), leading_columns(4)"


def test_errors_say_what_was_expected() -> None:
    with pytest.raises(ValueError, match="rank: expected an integer >= 1, got 0"):
        SOAP(nn.Linear(2, 2), rank=0)
    model = nn.Linear(4, 4)
    state = SOAP(model, rank=2).state_dict()
    with pytest.raises(ValueError, match="rank"):
        SOAP(model, rank=3).load_state_dict(state)


def test_columns_are_stored_as_they_are() -> None:
    member = parse("leading_columns(2)")(3, dtype=F64)
    Q = draw(0, 3, 2)
    assert torch.equal(member.with_tensors([Q]).to_dense(), torch.cat([Q, 0 * Q[:, :1]], 1))
