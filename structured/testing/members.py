"""The laws of what an algebra holds beyond sums and products, and of its members as tensors.

Written as in ``laws.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from structured._core.lazy import Product, Sum
from structured._core.matrix import Operator, StructuredMatrix
from structured._core.spec import Structure, parse
from structured.dense import Dense
from structured.testing.laws import assert_close

_MANY = 4096  # random numbers, of which mean and variance are known to 5 / sqrt(4096)


def inverse(K: StructuredMatrix) -> None:
    """``K^{-1}`` is a member."""
    found = K.inverse()
    assert found.layout == K.layout, f"inverse: {found!r}, expected one like {K!r}"
    assert_close(found, torch.linalg.inv(K.to_dense()), "inverse")


def division(K: StructuredMatrix, B: StructuredMatrix, x: Tensor) -> None:
    """``K.solve`` of a member is ``K^{-1} B``, a member, and of a vector ``K^{-1} x``."""
    expected = torch.linalg.inv(K.to_dense())
    found = K.solve(B)  # type: ignore[arg-type]  # declared for tensors, as structures write it
    assert isinstance(found, StructuredMatrix), f"solve(B): expected a member, got {found!r}"
    assert found.layout == K.layout, f"solve(B): {found!r}, expected one like {K!r}"
    assert_close(found, expected @ B.to_dense(), "solve(B)")
    assert_close(K.solve(x), expected @ x, "solve(x)")


def powers(A: StructuredMatrix, K: StructuredMatrix) -> None:
    """``A^k`` is the product of ``k`` times ``A``, or of its inverse."""
    dense = A.to_dense()
    expected = torch.eye(A.n, dtype=A.dtype).expand(A.shape)
    for k in range(5):
        found = A**k
        assert found.layout == A.layout, f"A ** {k}: {found!r}, expected one like {A!r}"
        assert_close(found, expected, f"A ** {k}")
        expected = expected @ dense
    inverse = torch.linalg.inv(K.to_dense())
    assert_close(K**-2, inverse @ inverse, "K ** -2")


def exponential(A: StructuredMatrix) -> None:
    """``exp(A)`` is a member."""
    found = A.exp()
    assert found.layout == A.layout, f"exp: {found!r}, expected one like {A!r}"
    assert_close(found, torch.linalg.matrix_exp(A.to_dense()), "exp")


def entries(A: StructuredMatrix) -> None:
    """``A[index]`` is ``A.to_dense()[index]``; a matrix that is left whole stays a member."""
    dense, n = A.to_dense(), A.n
    turned = torch.arange(n).flip(0)
    some: list[Any] = [(..., slice(None, None, 2), slice(1, None)), (..., turned, turned)]
    if n:
        some += [(..., turned, 0), (..., 0, -1), (..., n - 1, 0)]
        some += [(..., -1, slice(None)), (..., slice(1, 3), n // 2)]
    whole: list[Any] = [...]
    if A.batch_shape and A.batch_shape[0]:
        some += [(0, ..., slice(1))]
        whole += [0, (-1, ...), slice(1, None), torch.tensor([0, 0])]
    for index in some + whole:
        found, is_whole = A[index], any(index is each for each in whole)
        assert isinstance(found, StructuredMatrix) == is_whole, f"A[{index}]: got {found!r}"
        assert_close(found, dense[index], f"A[{index}]")
    for outside in ((..., n, 0), (..., 0, -n - 1), (0,) * (dense.ndim + 1)):
        try:
            found = A[outside]
        except IndexError:
            continue
        raise AssertionError(f"A[{outside}]: expected an IndexError, got {found}")


def batch_shapes(A: StructuredMatrix, B: StructuredMatrix) -> None:
    """Batch shapes broadcast; members are summed and expanded along them."""
    dense, count = A.to_dense(), len(A.batch_shape)
    wide = A.expand(2, *A.batch_shape)
    assert_close(wide, dense.expand(2, *A.shape), "expand")
    assert_close(wide + B, (dense + B.to_dense()).expand(2, *A.shape), "A + B, batches broadcast")
    assert_close(B - wide, (B.to_dense() - dense).expand(2, *A.shape), "B - A, batches broadcast")
    assert_close(wide @ B, (dense @ B.to_dense()).expand(2, *A.shape), "A @ B, batches broadcast")
    traces = (dense * B.to_dense().mT).sum((-2, -1)).expand(2, *A.batch_shape)
    assert_close(B.trace_product(wide), traces, "tr(A B), batches broadcast")
    assert_close(A.sum(), dense.sum(tuple(range(count))) if count else dense, "sum()")
    assert_close(A.sum(()), dense, "sum(())")
    for dim in range(count):
        assert_close(A.sum(dim), dense.sum(dim), f"sum({dim})")
        assert_close(A.sum(dim - count), dense.sum(dim), f"sum({dim - count})")
    try:
        found = A.sum(count)
    except IndexError:
        return
    raise AssertionError(f"sum({count}): expected an IndexError, got {found}")


def from_dense(structure: Structure, A: StructuredMatrix, M: Tensor) -> None:
    """``from_dense`` and ``to_structure`` read members back, and find the nearest of others."""
    ways: dict[str, Callable[[Tensor], StructuredMatrix]] = {"structure": structure.from_dense}
    read: Any = getattr(structure.factory, "from_dense", None)  # of a class
    if read is not None:
        ways["class"] = lambda M: read(M, *structure.options)
    ways["member"] = lambda M: Dense(M).to_structure(structure)
    for spec in ("dense", "diagonal", "lower_triangular", structure):
        other = parse(spec)
        found, expected = A.to_structure(spec), other.from_dense(A.to_dense())
        assert found.layout == expected.layout, f"to_structure({spec}): {found!r}, not {expected!r}"
        assert_close(found, expected.to_dense(), f"to_structure({spec})")
    for name, way in ways.items():
        again, nearest = way(A.to_dense()), way(M)
        assert again.layout == A.layout, f"from_dense of a {name}: {again!r}, expected {A!r}"
        assert_close(again, A.to_dense(), f"from_dense of a {name}")
        assert_close(nearest, A.orthogonal_project(M).to_dense(), f"from_dense of a {name}")


def random(structure: Structure, sizes: Sequence[int]) -> None:
    """Stored numbers of ``randn`` are standard normal, ``A.sample`` multiplies such columns."""
    n = max(sizes)
    opts: dict[str, Any] = {"dtype": torch.float64}

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    member = structure.randn(n, batch_shape=(2,), generator=seeded(), **opts)
    zero = structure(n, batch_shape=(2,), **opts)
    assert member.layout == zero.layout, f"randn: {member!r}, expected one like {zero!r}"
    again = zero.randn_like(generator=seeded())
    for mine, theirs in zip(member.tensors(), again.tensors(), strict=True):
        assert torch.equal(mine, theirs), f"randn: {mine}, then {theirs} of the same seed"
    many = zero.expand(-(-_MANY // max(zero.numel(), 1)), 2).randn_like(generator=seeded())
    numbers = torch.cat([t.flatten() for t in many.tensors()])
    for power, moment in ((1, 0.0), (2, 1.0), (4, 3.0)):
        found = float(numbers.pow(power).mean()) if len(numbers) else moment
        bound = 5 * math.sqrt((1, 2, 96)[power // 2] / _MANY)
        assert abs(found - moment) < bound, f"randn: moment {power} is {found}, expected {moment}"
    z = torch.empty(2, n, 3, **opts).normal_(generator=seeded())
    assert_close(member.sample(3, generator=seeded()), member.to_dense() @ z, "sample(3)")


def lazy(A: StructuredMatrix, K: StructuredMatrix, X: Tensor) -> None:
    """``A @ A.mT`` is ``A A^T``; sums and products with the transpose are operators."""
    dense, regular = A.to_dense(), K.to_dense()
    assert_close(_written(A @ A.mT), dense @ dense.mT, "A @ A.mT")
    assert_close(_written(A.mT @ A), dense.mT @ dense, "A.mT @ A")
    assert_close(_written(A @ (2 * A.mT)), 2 * dense @ dense.mT, "A @ 2 A.mT")
    total, product = Sum(A, A.mT), Product(A, K.mT)
    assert_close(total.apply(X), (dense + dense.mT) @ X, "(A + A.mT) X")
    assert_close(product.apply(X), dense @ (regular.mT @ X), "(A K.mT) X")
    assert_close(product.apply_transpose(X), regular @ (dense.mT @ X), "(A K.mT)^T X")
    assert_close(
        (total - product).to_dense(), dense + dense.mT - dense @ regular.mT, "sum - product"
    )
    solved = Product(K, K.mT).solve(X)
    assert_close(solved, torch.linalg.inv(regular @ regular.mT) @ X, "(K K.mT)^{-1} X")


def _written(A: Operator) -> Tensor:
    assert isinstance(A, Operator), f"expected an operator, got {type(A).__name__}"
    return A.to_dense()


MEMBERS = (
    inverse,
    division,
    powers,
    exponential,
    lazy,
    entries,
    batch_shapes,
    from_dense,
    random,
)
