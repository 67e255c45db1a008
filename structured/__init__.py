"""An algebra of structured square matrices on PyTorch.

A *structure* is a linear space of square matrices closed under multiplication; a *member* stores a
few tensors. See :class:`StructuredMatrix` for what a member can do and how to add a structure, and
:func:`parse` for naming one.
"""

from structured._matrix import Operator, StructuredMatrix, static
from structured._spec import Structure, StructureLike, parse
from structured.block_diagonal import BlockDiagonal
from structured.block_triangular import (
    BlockLower,
    BlockUpper,
    hierarchical,
    low_rank_lower,
    low_rank_upper,
)
from structured.dense import Dense
from structured.diagonal import Diagonal
from structured.kronecker import Kronecker
from structured.toeplitz import LowerToeplitz, UpperToeplitz
from structured.transposed import Transposed

__all__ = [
    "BlockDiagonal",
    "BlockLower",
    "BlockUpper",
    "Dense",
    "Diagonal",
    "Kronecker",
    "LowerToeplitz",
    "Operator",
    "Structure",
    "StructureLike",
    "StructuredMatrix",
    "Transposed",
    "UpperToeplitz",
    "hierarchical",
    "low_rank_lower",
    "low_rank_upper",
    "parse",
    "static",
]
