"""The laws of the algebra: what a member is, against its dense matrix and against the definition.

A law is a function that asserts; its arguments are named by letter, and it holds for all of them:
``A``, ``B`` members of one structure, ``K`` a well conditioned one, ``X [..., n, m]``, ``x [n]``,
``M [..., n, n]``, ``S`` the same and symmetric, ``c`` a scalar, ``dtype`` one of four,
``structure`` where they come from, ``sizes`` those that it has.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from structured._core.matrix import StructuredMatrix, trailing
from structured._core.spec import Structure
from structured.testing import definition

TOLERANCE = 1e-12


def assert_close(
    actual: Tensor | StructuredMatrix, expected: Tensor, what: str, tolerance: float = TOLERANCE
) -> None:
    """Raise unless shapes and dtypes are equal and the numbers to ``tolerance``, relatively."""
    dense = actual.to_dense() if isinstance(actual, StructuredMatrix) else actual
    if isinstance(actual, StructuredMatrix):
        assert actual.shape == dense.shape, f"{what}: shape {actual.shape}, dense {dense.shape}"
    assert dense.shape == expected.shape, f"{what}: shape {dense.shape}, expected {expected.shape}"
    assert dense.dtype == expected.dtype, f"{what}: dtype {dense.dtype}, expected {expected.dtype}"
    if dense.numel():
        error = float((dense - expected).detach().abs().max())
        scale = max(1.0, float(expected.detach().abs().max()))
        assert error <= tolerance * scale, (
            f"{what}: off by {error:.3g}; got {dense}, not {expected}"
        )


def linear(A: StructuredMatrix, B: StructuredMatrix) -> None:
    """``to_dense`` is linear in the stored tensors."""
    combined = A.map(lambda a, b: 2 * a - 3 * b, B)
    assert_close(combined, 2 * A.to_dense() - 3 * B.to_dense(), "to_dense of 2A - 3B")


def tensors(A: StructuredMatrix) -> None:
    """``with_tensors(tensors())`` is the same member."""
    stored = sum(t.numel() for t in A.tensors())
    assert A.numel() == stored, f"numel: {A.numel()}, expected {stored}"
    again = A.with_tensors(A.tensors())
    assert again.layout == A.layout, f"with_tensors: {again!r}, expected {A!r}"
    for mine, theirs in zip(A.tensors(), again.tensors(), strict=True):
        assert_close(theirs, mine, "with_tensors(tensors())")
    assert_close(again, A.to_dense(), "with_tensors(tensors())")


def zeros(structure: Structure, A: StructuredMatrix, dtype: torch.dtype) -> None:
    """``zeros`` and ``zeros_like`` are zero, with the size, batch shape and dtype asked for."""
    zero = structure(A.n, batch_shape=A.batch_shape, dtype=dtype)
    assert_close(zero, torch.zeros(A.shape, dtype=dtype), "zeros")
    like = structure(A.n, batch_shape=A.batch_shape, dtype=A.dtype)
    assert like.layout == A.layout, f"zeros: {like!r}, but with other tensors {A!r}"
    assert_close(A.zeros_like(), torch.zeros(A.shape, dtype=A.dtype), "zeros_like")
    assert A.zeros_like().layout == A.layout, f"zeros_like: {A.zeros_like()!r}, expected {A!r}"


def identity(structure: Structure, A: StructuredMatrix) -> None:
    """The space contains the identity."""
    member = structure.identity(A.n, batch_shape=A.batch_shape, dtype=A.dtype)
    eye = torch.eye(A.n, dtype=A.dtype)
    assert_close(member, eye.expand(A.shape), "identity")
    assert_close(definition.orthogonal_projection(A, eye), eye, "identity within the space")


def product(A: StructuredMatrix, B: StructuredMatrix) -> None:
    """The space is closed under multiplication, and ``A @ B`` is the product."""
    AB = A @ B
    assert AB.layout == A.layout, f"A @ B: {AB!r}, expected one like {A!r}"
    assert_close(AB, A.to_dense() @ B.to_dense(), "A @ B")


def addition(A: StructuredMatrix, B: StructuredMatrix) -> None:
    """``A + B``, ``A - B`` and ``-A``."""
    assert_close(A + B, A.to_dense() + B.to_dense(), "A + B")
    assert_close(A - B, A.to_dense() - B.to_dense(), "A - B")
    assert_close(-A, -A.to_dense(), "-A")


def scaling(A: StructuredMatrix, c: Any, dtype: torch.dtype) -> None:
    """``c A``, ``A c`` and ``A / c`` for numbers and tensors, one for each of the batch.

    The dtype stays that of ``A``.
    """
    dense = A.to_dense()
    factor = trailing(c, dense) if isinstance(c, Tensor) else c
    assert_close(c * A, factor * dense, "c * A")
    assert_close(A * c, factor * dense, "A * c")
    assert_close(A / c, dense / factor, "A / c")
    low = A.to(dtype)
    for found in (c * low, low / c):
        assert found.dtype == dtype, f"c A, A in {dtype}: got {found.dtype}"


def apply(A: StructuredMatrix, X: Tensor, x: Tensor) -> None:
    """``A X``, batch dimensions broadcast; ``A x`` for a vector."""
    assert_close(A.apply(X), A.to_dense() @ X, "apply(X)")
    assert_close(A @ X, A.to_dense() @ X, "A @ X")
    assert_close(A @ x, A.to_dense() @ x, "A @ x")


def apply_transpose(A: StructuredMatrix, X: Tensor, x: Tensor) -> None:
    """``A^T X``, which is ``X^T A``; ``x A`` for a vector."""
    assert_close(A.apply_transpose(X), A.to_dense().mT @ X, "apply_transpose(X)")
    assert_close(X.mT @ A, X.mT @ A.to_dense(), "X @ A")
    assert_close(x @ A, A.to_dense().mT @ x, "x @ A")


def transpose(A: StructuredMatrix) -> None:
    """``A.mT`` is a member of the transposed structure."""
    assert_close(A.mT, A.to_dense().mT, "A.mT")
    assert_close(A.mT.mT, A.to_dense(), "A.mT.mT")


def orthogonal_project(A: StructuredMatrix, M: Tensor) -> None:
    """``P`` reads members back and leaves a residual orthogonal to all of them."""
    assert_close(A.orthogonal_project(A.to_dense()), A.to_dense(), "P(A)")
    nearest = A.orthogonal_project(M)
    assert_close(nearest, definition.orthogonal_projection(A, M), "P(M)")
    assert_close(nearest.orthogonal_project(nearest.to_dense()), nearest.to_dense(), "P(P(M))")


def project(A: StructuredMatrix, S: Tensor) -> None:
    """``Pi(S)`` is the member of least norm whose symmetric part is nearest to ``S``."""
    assert_close(A.project(S), definition.projection(A, S), "Pi(S)")


def project_trace(A: StructuredMatrix, S: Tensor) -> None:
    """``tr Pi(S) = tr S``, for the identity is a member."""
    traces = A.project(S).to_dense().diagonal(dim1=-2, dim2=-1).sum(-1)
    assert_close(traces, S.diagonal(dim1=-2, dim2=-1).sum(-1), "tr Pi(S), expected tr S")


def project_gram(A: StructuredMatrix, X: Tensor) -> None:
    """``Pi(X X^T)``."""
    assert_close(A.project_gram(X), definition.projection(A, X @ X.mT), "Pi(X X^T)")


def orthogonal_project_gram(A: StructuredMatrix, X: Tensor) -> None:
    """``P(X X^T)``."""
    found = A.orthogonal_project_gram(X)
    assert_close(found, definition.orthogonal_projection(A, X @ X.mT), "P(X X^T)")


def gram(A: StructuredMatrix) -> None:
    """``Pi(A^T A)``."""
    dense = A.to_dense()
    assert A.gram().layout == A.layout, f"gram: {A.gram()!r}, expected one like {A!r}"
    assert_close(A.gram(), definition.projection(A, dense.mT @ dense), "Pi(A^T A)")


def outer(A: StructuredMatrix, K: StructuredMatrix, X: Tensor) -> None:
    """``A A^T`` as one operator, with its diagonal, trace, ``logdet`` and solves."""
    product = A.outer()
    expected = A.to_dense() @ A.to_dense().mT
    diagonal = expected.diagonal(dim1=-2, dim2=-1)
    assert_close(A.squared_rows(), diagonal, "squared_rows")
    assert_close(product.diagonal(), diagonal, "outer, its diagonal")
    assert_close(product.trace(), diagonal.sum(-1), "outer, its trace")
    regular = K.to_dense() @ K.to_dense().mT
    assert_close(K.outer().solve(X), torch.linalg.inv(regular) @ X, "outer, solved")
    assert_close(K.outer().logdet(), torch.linalg.slogdet(regular).logabsdet, "outer, logdet")
    assert product.shape == A.shape, f"outer: shape {product.shape}, expected {A.shape}"
    assert_close(product.to_dense(), expected, "outer")
    assert_close(product.apply(X), expected @ X, "outer, applied")
    assert_close(product.apply_transpose(X), expected @ X, "outer, transposed and applied")
    assert_close(product.mT.to_dense(), expected, "outer, transposed")


def stationarity(K: StructuredMatrix, B: StructuredMatrix, M: Tensor) -> None:
    """``r = Pi(K^T S K) - I`` is the Riemannian gradient of ``f = tr(K^T S K) - 2 log|det K|``.

    In every direction ``N`` of the group, ``d/dt f(K exp(tN)) = <r + r^T, N + N^T> / 2`` at t = 0;
    so ``f`` is stationary exactly where ``Pi(K^T S K) = I``. ``S = M M^T / 4096``: ``K`` is large.
    """
    S, N = M @ M.mT / 4096, B.to_dense()
    t = torch.zeros((), dtype=N.dtype, requires_grad=True)
    moved = K.to_dense() @ torch.matrix_exp(t * N)
    quadratic = (moved * (S @ moved)).sum()
    times = math.prod(torch.broadcast_shapes(S.shape[:-2], K.batch_shape)) // max(
        1, math.prod(K.batch_shape)
    )
    (slope,) = torch.autograd.grad(
        quadratic - 2 * times * torch.linalg.slogdet(moved).logabsdet.sum(), t
    )
    sandwich = K.apply_transpose(K.apply_transpose(S).mT)
    eye = torch.eye(K.n, dtype=N.dtype)
    r = K.project((sandwich + sandwich.mT) / 2).to_dense() - eye
    assert_close(slope, ((r + r.mT) * (N + N.mT)).sum() / 2, "slope of f along N")


def diagonal(A: StructuredMatrix) -> None:
    """The entries ``A_ii``."""
    assert_close(A.diagonal(), A.to_dense().diagonal(dim1=-2, dim2=-1), "diagonal")


def trace(A: StructuredMatrix) -> None:
    """Sum of the diagonal."""
    assert_close(A.trace(), A.to_dense().diagonal(dim1=-2, dim2=-1).sum(-1), "trace")


def trace_product(A: StructuredMatrix, B: StructuredMatrix) -> None:
    """``tr(A B)``."""
    expected = (A.to_dense() * B.to_dense().mT).sum((-2, -1))
    assert_close(A.trace_product(B), expected, "tr(A B)")


def add_scaled_identity(A: StructuredMatrix, c: Any, dtype: torch.dtype) -> None:
    """``A + c I`` for a number or a tensor, one for each of the batch."""
    dense = A.to_dense()
    eye = torch.eye(A.n, dtype=A.dtype)
    expected = dense + (trailing(c, dense) if isinstance(c, Tensor) else c) * eye
    shifted = A.add_scaled_identity(c)
    assert shifted.layout == A.layout, f"A + c I: {shifted!r}, expected one like {A!r}"
    assert_close(shifted, expected, "A + c I")
    low = A.to(dtype).add_scaled_identity(c)
    assert low.dtype == dtype, f"A + c I, A in {dtype}: got {low.dtype}"


def max_abs(A: StructuredMatrix) -> None:
    """Largest absolute entry; zero if there is none."""
    padded = torch.nn.functional.pad(A.to_dense(), (0, 1, 0, 1))
    assert_close(A.max_abs(), padded.abs().amax((-2, -1)), "max_abs")


def spectral_norm(A: StructuredMatrix) -> None:
    """Largest singular value; zero if there is none."""
    padded = torch.nn.functional.pad(A.to_dense(), (0, 1, 0, 1))
    assert_close(A.spectral_norm(), torch.linalg.svdvals(padded).amax(-1), "spectral_norm")


def frobenius_norm(A: StructuredMatrix) -> None:
    """Square root of the sum of all squared entries."""
    assert_close(A.frobenius_norm(), A.to_dense().square().sum((-2, -1)).sqrt(), "frobenius_norm")


def transpose_closure(A: StructuredMatrix, K: StructuredMatrix, S: Tensor) -> None:
    """Where ``closed_under_transpose``, ``A^T`` is a member and ``Pi(K^T S K) = K^T Pi(S) K``."""
    if not A.closed_under_transpose:
        return
    transposed = A.to_dense().mT
    assert_close(definition.orthogonal_projection(A, transposed), transposed, "A^T in the space")
    dense = K.to_dense()
    outside = dense.mT @ definition.projection(K, S) @ dense
    inside = definition.projection(K, dense.mT @ S @ dense)
    assert_close(inside, outside, "Pi(K^T S K), expected K^T Pi(S) K")


def congruence(K: StructuredMatrix, S: Tensor) -> None:
    """``Pi(K^T S K)`` from ``Pi(S)``, where ``closed_under_congruence``."""
    if not K.closed_under_congruence:
        return
    dense, S = K.to_dense(), S.sum(tuple(range(S.ndim - 2))).expand(K.shape)
    expected = definition.projection(K, dense.mT @ S @ dense)
    assert_close(K.congruence(K.project(S)), expected, "Pi(K^T S K) from Pi(S)")


ALGEBRA = (
    linear,
    tensors,
    zeros,
    identity,
    product,
    addition,
    scaling,
    apply,
    apply_transpose,
    transpose,
    orthogonal_project,
    project,
    project_trace,
    project_gram,
    orthogonal_project_gram,
    gram,
    outer,
    stationarity,
    diagonal,
    trace,
    trace_product,
    add_scaled_identity,
    max_abs,
    spectral_norm,
    frobenius_norm,
    transpose_closure,
    congruence,
)
