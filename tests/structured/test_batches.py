"""Members as batches: what the laws of entries and of batch shapes do not draw."""

import pytest
import torch

from structured import (
    BlockUpper,
    Dense,
    Diagonal,
    DirectSum,
    Kronecker,
    Rotated,
    Strided,
    Structure,
    Tied,
    Transposed,
    inverse_root,
    parse,
)
from structured.testing import assert_close


def normal(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def test_rotated_members_with_a_basis_each():
    Q = torch.linalg.qr(normal(2, 4, 4)).Q
    A = Rotated(Diagonal(normal(3, 2, 4)), Q)
    for index in ((), 1, (..., 1, slice(None)), (0, 1), slice(1, None), torch.tensor([2, 0])):
        assert_close(A[index], A.to_dense()[index], f"A[{index}]")
    for index in (1, (0, 1), (slice(None), 1)):
        assert isinstance(A[index], Rotated)
    with pytest.raises(ValueError, match="expected one basis Q for all, got"):
        A.sum(1)
    with pytest.raises(TypeError, match="expected a tensor Q, got Kronecker"):
        Rotated(A.A, Kronecker(Dense(Q[:, :2, :2]), Dense(Q[:, 2:, 2:])))[0]


def test_entries_of_a_kronecker_product():
    P = Kronecker(Dense(normal(2, 3, 3)), Diagonal(normal(2)))
    dense = P.to_dense()
    for index in ((..., 4, 5), (0, 1), (1, ..., slice(1, 3), 0), (..., slice(None, None, 2), 1)):
        assert_close(P[index], dense[index], f"P[{index}]")
    assert P.numel() == 20
    assert P.half().dtype == torch.float16


def test_one_entry_of_a_large_member():
    """A dense matrix of this size would not fit."""
    A = parse("hierarchical(2, 2)").randn(1 << 20, generator=torch.Generator().manual_seed(0))
    assert A[..., 7, 7] == A.diagonal()[7]
    assert A[0, -1] == A.top[0, -1]
    assert A[..., -1, :].shape == (1 << 20,)


@pytest.mark.parametrize("spec", ["lower_toeplitz", "hierarchical(1, 1)"])
def test_exponentials_of_any_norm(spec):
    """Also within ``vmap``, which cannot count squarings."""
    A = parse(spec).randn(6, batch_shape=(3,), dtype=torch.float64)
    scales = torch.tensor([1e-3, 3.0, 300.0], dtype=torch.float64)
    A = (A * scales).add_scaled_identity(-3 * scales)
    expected = torch.linalg.matrix_exp(A.to_dense())
    torch.testing.assert_close(A.exp().to_dense(), expected, rtol=1e-9, atol=1e-13)
    mapped = torch.vmap(lambda A: A.exp())(A)
    torch.testing.assert_close(mapped.to_dense(), expected, rtol=1e-9, atol=1e-13)
    assert (-1e9 * A.zeros_like().add_scaled_identity(1.0)).exp().max_abs().max() == 0


@pytest.mark.parametrize(
    ("batch", "to"), [((2,), (3,)), ((2, 1), (2,)), ((), (0, 3)), ((2,), (4, -1))]
)
def test_expand_says_what_does_not_broadcast(batch, to):
    A = parse("hierarchical(1, 1)").identity(4, batch_shape=batch)
    if batch == () or -1 in to:
        expected = tuple(A.to_dense().expand(*to, 4, 4).shape)
        assert A.expand(*to).shape == expected
        return
    with pytest.raises(ValueError, match=r"expand: expected a batch shape that .* broadcasts to"):
        A.expand(*to)


@pytest.mark.parametrize("batch", [(), (1,), (2,), (3, 1), (3, 2)])
@pytest.mark.parametrize("wrap", [lambda Q: Q, lambda Q: Kronecker(Dense(Q))])
def test_batches_of_members_and_of_bases_broadcast(batch, wrap):
    Q = torch.linalg.qr(normal(2, 4, 4)).Q
    A = Diagonal(2 + normal(*batch, 4).cos())
    R, dense = Rotated(A, wrap(Q)), Q @ A.to_dense() @ Q.mT
    assert R.batch_shape == dense.shape[:-2]
    assert_close(R.to_dense(), dense, "to_dense")
    assert_close(R.trace(), dense.diagonal(dim1=-2, dim2=-1).sum(-1), "trace")
    assert_close(R.logdet(), torch.linalg.slogdet(dense).logabsdet, "logdet")
    assert_close((R + R).to_dense(), 2 * dense, "sum")
    assert_close(R.apply(normal(4, 3)), dense @ normal(4, 3), "apply")


def test_members_of_a_structure_of_bases_are_batches():
    Q = torch.linalg.qr(normal(2, 4, 4)).Q
    structure = Structure(Rotated, (parse("diagonal"), Q))
    assert structure(4).batch_shape == (2,)
    S = normal(4, 9) @ normal(4, 9).mT
    K = inverse_root(structure, S)
    for i, one in enumerate(Q):
        expected = inverse_root(Structure(Rotated, (parse("diagonal"), one)), S)
        assert_close(K[i].to_dense(), expected.to_dense(), "inverse_root")
    moved = Rotated(Diagonal(normal(4)), "cosine").rebase(Q)
    assert moved.batch_shape == (2,)
    with pytest.raises(ValueError, match=r"a batch of Q that broadcasts with \[3\], got \[2\]"):
        Rotated(Diagonal(normal(3, 4)), Q)


def test_compositions_of_members_with_a_basis_each():
    Q = torch.linalg.qr(normal(2, 4, 4)).Q
    R, D = Rotated(Diagonal(normal(3, 2, 4)), Q), Dense(normal(3, 2, 3, 3))
    whole = [
        DirectSum(R, D),
        BlockUpper(R, normal(3, 2, 4, 3), D),
        Transposed(R),
        Tied(R, k=2),
        Rotated(R, "cosine"),
        Strided(R),
        Strided(DirectSum(Rotated(R, Q), D)),
    ]
    for A in whole:
        count = len(A.batch_shape)
        for index in ((1,), (-1,), (slice(1, None),), (torch.tensor([2, 0]),), (..., 1)[:count]):
            assert_close(A[index], A.to_dense()[index], f"{A}[{index}]")
        assert_close(A.sum(0), A.to_dense().sum(0), f"sum of {A} over members of one basis")
        if count > 1:
            with pytest.raises(ValueError, match="expected one basis Q for all, got"):
                A.sum(1)
