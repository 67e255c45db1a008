"""The definition of the projections, by least squares over a basis: slow, and plain to see.

What every projection in this package is checked against. ``V`` is the space of a structure, spanned
by what ``to_dense`` makes of one stored number at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structured._core.matrix import StructuredMatrix

_RANK_TOLERANCE = 1e-10


def basis(member: StructuredMatrix) -> Tensor:
    """One dense matrix for every stored number, ``[p, n, n]``."""
    cores = [t.shape[len(member.batch_shape) :] for t in member.tensors()]
    p = sum(core.numel() for core in cores)
    units = torch.eye(p, dtype=member.dtype).split([core.numel() for core in cores], 1)
    parts = [unit.reshape((p, *core)) for unit, core in zip(units, cores, strict=True)]
    return member.with_tensors(parts).to_dense()


def orthonormal_basis(member: StructuredMatrix) -> Tensor:
    """An orthonormal basis of the space, ``[dim V, n, n]``."""
    spanning = basis(member)
    if not spanning.numel():
        return spanning
    _, values, vectors = torch.linalg.svd(spanning.flatten(1), full_matrices=False)
    return vectors[values > _RANK_TOLERANCE * values[0]].unflatten(1, spanning.shape[-2:])


def orthogonal_projection(member: StructuredMatrix, M: Tensor) -> Tensor:
    """The element of V nearest to ``M [..., n, n]``, dense."""
    Q = orthonormal_basis(member)
    return torch.einsum("...ij,pij,pkl->...kl", M, Q, Q)


def projection(member: StructuredMatrix, S: Tensor) -> Tensor:
    """``Pi(S) = argmin_{r in V} || (r + r^T) / 2 - S ||`` of least norm, dense."""
    Q = orthonormal_basis(member)
    halves = ((Q + Q.mT) / 2).flatten(1).mT
    coordinates = S.flatten(-2) @ torch.linalg.pinv(halves, rtol=_RANK_TOLERANCE).mT
    return torch.einsum("...p,pkl->...kl", coordinates, Q)


def read(member: StructuredMatrix, M: Tensor) -> StructuredMatrix:
    """The member like ``member`` with the dense matrix ``M [..., n, n]`` of the space."""
    cores = [t.shape[len(member.batch_shape) :] for t in member.tensors()]
    E = basis(member).flatten(1).mT
    coordinates = M.flatten(-2) @ torch.linalg.pinv(E, rtol=_RANK_TOLERANCE).mT
    parts = coordinates.split([core.numel() for core in cores], -1)
    return member.with_tensors(
        [part.reshape((*M.shape[:-2], *core)) for part, core in zip(parts, cores, strict=True)]
    )
