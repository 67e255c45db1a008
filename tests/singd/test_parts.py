"""Parts of factors: rows of diagonal and block-diagonal members."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from singd.methods.inverse_free import InverseFree, InverseFreeFactors
from singd.ops.parts import Part, mixed_rows, within
from singd.ops.stochastic_rounding import Rounding
from structured import parse

SPECS = st.sampled_from(["diagonal", "block_diagonal(1)", "block_diagonal(2)", "block_diagonal(3)"])


def parts_of(spec: str, n: int, blocks: int) -> tuple[Any, list[slice]]:
    """A member ``[2, n, n]``, and its rows in parts of so many blocks."""
    zero = parse(spec)(n, batch_shape=(2,), dtype=torch.float32)
    numbers = torch.Generator().manual_seed(n)
    C = zero.map(lambda t: torch.randn(t.shape, generator=numbers))
    each = (mixed_rows(C) or 1) * blocks
    return C, [slice(a, min(a + each, n)) for a in range(0, n, each)]


@given(SPECS, st.integers(1, 11), st.integers(1, 3))
def test_parts_are_the_blocks_of_the_whole(spec: str, n: int, blocks: int) -> None:
    C, sides = parts_of(spec, n, blocks)
    whole = C.to_dense()
    for side in [*sides, slice(n, n)]:
        torch.testing.assert_close(within(C, side).to_dense(), whole[:, side, side], rtol=0, atol=0)
    assert sum(within(C, side).trace() for side in sides).allclose(C.trace())


@given(SPECS, st.integers(2, 11), st.integers(1, 3), st.booleans())
def test_a_part_is_rounded_as_in_the_whole(spec: str, n: int, blocks: int, tail: bool) -> None:
    C, sides = parts_of(spec, n, blocks)
    k = mixed_rows(C) or 1
    rounding = Rounding(0, 3)
    whole = C.map(lambda t: rounding(t, torch.bfloat16, ["a", "b"]))
    for side in sides:
        has_tail = tail and side.stop < n and n % k == 1 % k
        part = Part("grad", None, (side.start, side.stop, n), 1, tail=int(has_tail))
        for t, indices, wanted in zip(
            part.of(C).tensors(), part.indices(C), part.of(whole).tensors(), strict=True
        ):
            got = rounding(t, torch.bfloat16, ["a", "b"], indices)
            torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@given(SPECS, st.integers(1, 4), st.integers(1, 3))
def test_a_tail_is_a_copy_that_is_not_counted(spec: str, count: int, blocks: int) -> None:
    """As the constant input of a bias, after inputs that ranks share."""
    k = int(spec[-2]) if "(" in spec else 1
    C, sides = parts_of(spec, count * k + 1, blocks)
    whole = C.to_dense()
    for side in sides[:-1]:
        part = Part("input", None, (side.start, side.stop, C.n), 1, tail=1)
        rows = [*range(side.start, side.stop), C.n - 1]
        got = part.of(C)
        torch.testing.assert_close(got.to_dense(), whole[:, rows][:, :, rows], rtol=0, atol=0)
        torch.testing.assert_close(
            part.counted(got).to_dense(), whole[:, side, side], rtol=0, atol=0
        )


@given(SPECS, SPECS, st.integers(1, 7), st.integers(2, 7), st.booleans())
def test_a_part_of_a_direction_needs_that_part_of_the_gradient_alone(
    left: str, right: str, d_out: int, d_in: int, keeps: bool
) -> None:
    """Some rows, or columns in two parts, give the same ones of the whole direction."""
    (C, rows), (K, _) = parts_of(left, d_out, 1), parts_of(right, d_in, 1)
    method, factors = InverseFree(), InverseFreeFactors(K, C)
    options = {"keep_products": keeps, "preconditioner_dtype": (None, None)}
    products = method.products(factors, options)
    G = torch.randn(2, d_out, d_in, generator=torch.Generator().manual_seed(d_in))
    whole = method.precondition(factors, G, products)
    by_rows = [method.apply_rows(factors, G[:, r], products, r) for r in rows]
    torch.testing.assert_close(torch.cat(by_rows, 1), whole)
    assert method.is_apart(factors, products) == keeps
    if keeps:
        apart = method.apply_apart(factors, G[..., :-1], G[..., -1:], products)
        torch.testing.assert_close(torch.cat(apart, -1), whole)
