"""Hypothesis strategies for members and operands, named by the letters of the laws.

Numbers are small integers in float64: arithmetic on them is exact, and counterexamples shrink to
something readable. Every number is drawn by itself, so that no member is symmetric but by chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Size, Tensor

from structured._core.matrix import StructuredMatrix
from structured._core.spec import Structure, parse
from structured.testing import definition

SIZES = range(13)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BATCH_SHAPES: tuple[tuple[int, ...], ...] = ((), (2,), (1, 3), (0,))
LEAVES = (
    "dense",
    "diagonal",
    "block_diagonal({k})",
    "lower_triangular",
    "upper_toeplitz",
    "circulant",
    "scaled_identity",
)
COMBINATORS = (
    "block_upper({A}, {C}, {split})",
    "block_lower({A}, {C}, {split})",
    "direct_sum({A}, {C}, {split})",
    "transposed({A})",
    "rotated({A}, hadamard)",
    "rotated({A}, cosine)",
)

_DIGITS = torch.tensor([0, 1, -1, 2, -2, 3, -3], dtype=torch.float64)
_DOMINANT = 64.0


@dataclass(frozen=True)
class Operands:
    """One of everything, all of one batch shape: what an operation may take."""

    A: StructuredMatrix
    B: StructuredMatrix
    K: StructuredMatrix  # well conditioned
    X: Tensor  # [..., n, m]
    S: Tensor  # [..., n, n], symmetric

    def map(self, function: Callable[[Tensor], Tensor]) -> Operands:
        """Apply ``function`` to every tensor."""
        A, B, K = (member.map(function) for member in (self.A, self.B, self.K))
        return Operands(A, B, K, function(self.X), function(self.S))

    def to(self, dtype: torch.dtype) -> Operands:
        """Everything in another dtype."""
        A, B, K = (member.to(dtype) for member in (self.A, self.B, self.K))
        return Operands(A, B, K, self.X.to(dtype), self.S.to(dtype))

    def tensors(self) -> list[Tensor]:
        """Every tensor, in order."""
        members = (self.A, self.B, self.K)
        return [*(t for member in members for t in member.tensors()), self.X, self.S]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Operands:
        """The same operands with other numbers, ordered as :meth:`tensors`."""
        rest = iter(tensors)
        return self.map(lambda _: next(rest))


@st.composite
def structures(draw: DrawFn, depth: int = 3) -> Structure:
    """Random nestings of the combinators, at most ``depth`` deep."""

    def spec(depth: int) -> str:
        words = LEAVES if depth == 0 else LEAVES[:3] + COMBINATORS
        return draw(st.sampled_from(words)).format_map(_Parts(depth - 1))

    class _Parts(dict[str, object]):
        def __init__(self, depth: int) -> None:
            self.depth = depth

        def __missing__(self, key: str) -> object:
            if key == "k":
                return draw(st.integers(1, 4))
            return draw(st.integers(-4, 4)) if key == "split" else spec(self.depth)

    return parse(spec(depth))


@st.composite
def tensors(draw: DrawFn, shape: Sequence[int], *, strided: bool = True) -> Tensor:
    """Integers from -3 to 3 in float64, in memory of any layout."""
    count = math.prod(shape)
    digits = torch.tensor(list(draw(st.binary(min_size=count, max_size=count))), dtype=torch.long)
    values = _DIGITS[digits % len(_DIGITS)].reshape(tuple(shape))
    layout = draw(st.sampled_from(("contiguous", "transposed", "spaced"))) if strided else ""
    if layout == "transposed" and values.ndim > 1:
        return values.mT.contiguous().mT
    if layout == "spaced" and values.ndim:
        wide = torch.full((*shape, 2), 7.0, dtype=values.dtype)
        wide[..., 1] = values
        return wide[..., 1]
    return values


@st.composite
def members(draw: DrawFn, like: StructuredMatrix) -> StructuredMatrix:
    """Members of the structure, size and batch shape of ``like``."""
    return like.with_tensors([draw(tensors(t.shape)) for t in like.tensors()])


@st.composite
def conditioned(draw: DrawFn, like: StructuredMatrix) -> StructuredMatrix:
    """Members with a dominant diagonal, hence well conditioned, and not symmetric."""
    dense = draw(members(like)).to_dense()
    dominant = _DOMINANT + dense.abs().sum((-2, -1))
    eye = torch.eye(like.n, dtype=like.dtype)
    return definition.read(like, dense + dominant[..., None, None] * eye)


@st.composite
def symmetric(draw: DrawFn, shape: Sequence[int]) -> Tensor:
    """Symmetric matrices."""
    M = draw(tensors(shape))
    return torch.tril(M) + torch.tril(M, -1).mT


@st.composite
def operands(draw: DrawFn, like: StructuredMatrix) -> Operands:
    """One of everything."""
    batch, m = like.batch_shape, draw(st.integers(0, 4))
    A, B = draw(members(like)), draw(members(like))
    X = draw(tensors((*batch, like.n, m)))
    return Operands(A, B, draw(conditioned(like)), X, draw(symmetric(like.shape)))


def broadcastable(batch: Size) -> SearchStrategy[tuple[int, ...]]:
    """Batch shapes that broadcast with ``batch``."""
    return st.sampled_from(((), tuple(batch), (1,) * len(batch), (3, *batch)))


def scalars(like: StructuredMatrix) -> SearchStrategy[Any]:
    """Nonzero numbers, and tensors without dimensions or of the batch shape."""
    numbers = st.sampled_from((1, -2, 0.5, 3.0))

    def full(c: float) -> Tensor:
        ramp = torch.arange(math.prod(like.batch_shape), dtype=like.dtype)
        return (ramp + abs(c)).reshape(like.batch_shape)

    return numbers | numbers.map(lambda c: torch.tensor(c, dtype=like.dtype)) | numbers.map(full)


@st.composite
def cases(
    draw: DrawFn, choices: SearchStrategy[Structure], letters: Sequence[str], sizes: Sequence[int]
) -> dict[str, Any]:
    """A value for each of ``letters``, the arguments of a law, and the structure."""
    structure = draw(choices)
    n, batch = draw(st.sampled_from(sizes)), draw(st.sampled_from(BATCH_SHAPES))
    like = structure(n, batch_shape=batch, dtype=torch.float64)
    columns = draw(broadcastable(like.batch_shape))
    strategies: dict[str, Callable[[], SearchStrategy[Any]]] = {
        "structure": lambda: st.just(structure),
        "other": lambda: st.sampled_from(sizes).map(lambda k: structure(k, dtype=torch.float64)),
        "A": lambda: members(like),
        "B": lambda: members(like),
        "K": lambda: conditioned(like),
        "X": lambda: st.integers(0, 4).flatmap(lambda m: tensors((*columns, n, m))),
        "x": lambda: tensors((n,)),
        "M": lambda: tensors((*columns, n, n)),
        "S": lambda: symmetric((*columns, n, n)),
        "c": lambda: scalars(like),
        "operands": lambda: operands(like),
        "dtype": lambda: st.sampled_from(DTYPES),
        "sizes": lambda: st.just(sizes),
    }
    return {letter: draw(strategies[letter]()) for letter in ("structure", *letters)}
