"""Symmetric matrices in one half of their numbers: what is unpacked is what was packed."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structured import LowerTriangular, pack_symmetric, unpack_symmetric
from structured._products import packing

F64 = torch.float64
BATCHES = st.lists(st.integers(0, 3), max_size=2).map(tuple)


def symmetric(n: int, batch: tuple[int, ...], dtype: torch.dtype = F64) -> Tensor:
    A = torch.randn(*batch, n, n, dtype=F64)
    return (A + A.mT).to(dtype)


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(0, 12),
    batch=BATCHES,
    dtype=st.sampled_from([F64, torch.float32, torch.bfloat16]),
    strided=st.booleans(),
    tile=st.sampled_from([1, 2, 3, 128]),
)
def test_a_round_trip(
    n: int, batch: tuple[int, ...], dtype: torch.dtype, strided: bool, tile: int
) -> None:
    """To the bit; it takes n (n + 1) / 2 numbers, and may write into memory that is there."""
    with mock.patch.object(packing, "_TILE", tile):
        round_trip(n, batch, dtype, strided)


def round_trip(n: int, batch: tuple[int, ...], dtype: torch.dtype, strided: bool) -> None:
    S = symmetric(n, batch, dtype)
    S = S.repeat_interleave(2, -1)[..., ::2] if strided else S
    R = pack_symmetric(S)
    assert R.shape == (*batch, n + 1 - n % 2, (n + 1) // 2)
    assert R.dtype == dtype
    assert R.numel() == S[..., 0, 0].numel() * (n * (n + 1) // 2) if n else not R.numel()
    assert torch.equal(unpack_symmetric(R), S)
    whole = torch.full((*batch, n, n + 1), torch.nan, dtype=dtype)
    assert unpack_symmetric(R, out=whole[..., :n]).data_ptr() == whole.data_ptr()
    assert torch.equal(whole[..., :n], S)
    assert bool(whole[..., n:].isnan().all())


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 9), batch=BATCHES)
def test_numbers_are_those_of_a_triangle(n: int, batch: tuple[int, ...]) -> None:
    """In the same places as in :class:`LowerTriangular`; sums of packed ones are packed sums."""
    S, T = symmetric(n, batch), symmetric(n, batch)
    assert torch.equal(LowerTriangular(pack_symmetric(S)).to_dense(), S.tril())
    assert torch.equal(pack_symmetric(S) + pack_symmetric(T), pack_symmetric(S + T))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("n", [4, 5])
def test_what_is_not_finite_stays_in_its_place(n: int, bad: float) -> None:
    for i in range(n):
        for j in range(n):
            S = torch.ones(n, n)
            S[i, j] = S[j, i] = bad
            again = unpack_symmetric(pack_symmetric(S))
            torch.testing.assert_close(again, S, rtol=0, atol=0, equal_nan=True)


def test_other_shapes_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"expected square matrices, got \[3, 2\]"):
        pack_symmetric(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"expected square matrices, got \[3\]"):
        pack_symmetric(torch.zeros(3))
    for shape in ((3, 3), (4, 2), (1, 2), (5,), ()):
        with pytest.raises(ValueError, match=r"expected \[..., n \+ 1 - n % 2, \(n \+ 1\) // 2\]"):
            unpack_symmetric(torch.zeros(shape))


@pytest.mark.parametrize("n", [0, 1, 4, 5])
def test_it_is_differentiated_and_mapped(n: int) -> None:
    S = symmetric(n, (3,))

    def again(S: Tensor) -> Tensor:
        return unpack_symmetric(pack_symmetric(S))

    assert torch.equal(torch.vmap(again)(S), S)
    assert torch.equal(torch.func.jvp(again, (S,), (2 * S,))[1], 2 * S)
    if n:
        assert torch.autograd.gradcheck(again, S.clone().requires_grad_())
