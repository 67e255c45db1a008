"""An algebra of structured square matrices on PyTorch.

A *structure* is a linear space of square matrices closed under multiplication; a *member* stores a
few tensors. See :class:`StructuredMatrix` for what a member can do and how to add a structure, and
:func:`parse` for naming one.
"""

from structured._core.dispatch import add_symmetric_product_
from structured._core.lazy import Outer, Product, Sum
from structured._core.matrix import Operator, StructuredMatrix, static
from structured._core.spec import Structure, StructureLike, parse
from structured._core.version import version
from structured._products.packing import pack_symmetric, unpack_symmetric
from structured.block_circulant import BlockCirculant
from structured.block_diagonal import BlockDiagonal
from structured.block_triangular import (
    BlockLower,
    BlockUpper,
    low_rank_lower,
    low_rank_upper,
)
from structured.centrosymmetric import centrosymmetric
from structured.circulant import Circulant
from structured.costs import cost, cost_of
from structured.dense import Dense
from structured.diagonal import Diagonal
from structured.direct_sum import DirectSum
from structured.group_algebra import GroupAlgebra
from structured.hierarchical import Hierarchical
from structured.hypercomplex import Hypercomplex, complex_numbers, quaternions
from structured.incidence import Incidence
from structured.inverse_root import divergence, inverse_root
from structured.kron import Kron
from structured.kronecker import Kronecker
from structured.parameter import StructuredParameter
from structured.rotated import Rotated
from structured.scaled_identity import ScaledIdentity
from structured.strided import Strided
from structured.tied import Tied
from structured.toeplitz import LowerToeplitz, UpperToeplitz
from structured.transposed import Transposed
from structured.triangular import LowerTriangular, UpperTriangular
from structured.up_to import up_to

__version__ = version()

__all__ = [
    "BlockCirculant",
    "BlockDiagonal",
    "BlockLower",
    "BlockUpper",
    "Circulant",
    "Dense",
    "Diagonal",
    "DirectSum",
    "GroupAlgebra",
    "Hierarchical",
    "Hypercomplex",
    "Incidence",
    "Kron",
    "Kronecker",
    "LowerToeplitz",
    "LowerTriangular",
    "Operator",
    "Outer",
    "Product",
    "Rotated",
    "ScaledIdentity",
    "Strided",
    "Structure",
    "StructureLike",
    "StructuredMatrix",
    "StructuredParameter",
    "Sum",
    "Tied",
    "Transposed",
    "UpperToeplitz",
    "UpperTriangular",
    "__version__",
    "add_symmetric_product_",
    "centrosymmetric",
    "complex_numbers",
    "cost",
    "cost_of",
    "divergence",
    "inverse_root",
    "low_rank_lower",
    "low_rank_upper",
    "pack_symmetric",
    "parse",
    "quaternions",
    "static",
    "unpack_symmetric",
    "up_to",
]
