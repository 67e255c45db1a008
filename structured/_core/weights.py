"""Weights of the default projections, found by probing: from ``E^T M`` to the stored numbers.

``E`` is the linear map from the ``p`` stored numbers to the ``n x n`` matrix, ``T`` transposition,
``G = E^T E`` and ``H = E^T T E``; :mod:`structured._core.defaults` has the formulas. A random
vector ``r`` distinguishes three kinds of numbers, for the cost of a few products with E:

- ``(G r)_i = 0``: the number has no place in the matrix (it is masked), and its weight is zero.
- ``(G r)_i = g_i r_i`` and ``(G^{-1} H)^2 r = s r`` there, ``s_i`` 0 or 1: the number owns its
  places, and has the weights ``1 / g_i`` and ``2 / (g_i (1 + s_i))``.
- The others share places. They fall into groups that have nothing to do with each other, mostly
  small, with a matrix each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_TOLERANCE = 1e-9
_NOTHING = 1e-13  # relative to the largest: what rounding makes of zero
_CHUNK = 1 << 24  # numbers of E written out at a time
_DENSE = 1 / 16  # of the entries nonzero, and sparse products do not pay

Map = Callable[[Tensor], Tensor]


class Groups(NamedTuple):
    """``k`` groups of ``c`` numbers each that share places within their group."""

    numbers: Tensor  # [k, c]
    orthogonal: Tensor  # [k, c, c]
    symmetric: Tensor  # [k, c, c]


class Weights(NamedTuple):
    """What turns ``E^T M`` into coordinates: vectors in float64, zero for numbers of a group."""

    orthogonal: Tensor  # [p]
    symmetric: Tensor  # [p]
    groups: tuple[Groups, ...]  # one for each size of a group


def analyse(push: Map, pull: Map, p: int) -> Weights:
    """The weights of ``p`` numbers, on the CPU in float64.

    Args:
        push: ``E``, ``[..., n, n]`` from ``[..., p]``.
        pull: ``E^T``, ``[..., p]`` from ``[..., n, n]``.
        p: How many numbers are stored.
    """
    generator = torch.Generator().manual_seed(0)
    r = torch.randn(p, dtype=torch.float64, generator=generator, device="cpu")

    def G(flat: Tensor) -> Tensor:
        return pull(push(flat))

    def H(flat: Tensor) -> Tensor:
        return pull(push(flat).mT)

    g, mixed_sums = G(torch.ones_like(r)), G(r)
    placed = ~_vanishes(mixed_sums)
    shared = placed & ~torch.isclose(mixed_sums, g * r, rtol=_TOLERANCE, atol=0)
    while True:  # until those that own their places have no mirror image among those that do not
        inverse = torch.where(placed & ~shared, 1 / g, 0)
        s = inverse * H(inverse * H(torch.where(shared, 0, r))) / r
        odd = torch.minimum(s.abs(), (s - 1).abs()) > _TOLERANCE
        found = (odd | ~_vanishes(H(torch.where(shared, r, 0)))) & placed & ~shared
        if not found.any():
            break
        shared = shared | found
    return Weights(inverse, 2 * inverse / (1 + s.round()), _groups(push, shared))


def _vanishes(t: Tensor) -> Tensor:
    return t.abs() <= _NOTHING * t.abs().max() if t.numel() else t == 0


def _groups(push: Map, shared: Tensor) -> tuple[Groups, ...]:
    """The numbers that share places, by the size of their group."""
    import scipy.sparse  # here, as few structures need it
    from scipy.sparse.csgraph import connected_components

    numbers = shared.nonzero()[:, 0]
    if not len(numbers):
        return ()
    E, ET = _written_out(push, len(shared), numbers)
    G, H = E @ E.T, E @ ET.T
    count, label = connected_components(scipy.sparse.csr_array(abs(G) + abs(H)), directed=False)
    sizes = np.bincount(label, minlength=count)
    order = np.argsort(label, kind="stable")
    starts = np.cumsum(sizes) - sizes
    made = []
    for c in np.unique(sizes):
        places = order[starts[sizes == c][:, None] + np.arange(c)]  # [k, c]
        rows = np.repeat(places, c, -1).ravel()
        columns = np.tile(places, (1, c)).ravel()
        blocks = [torch.from_numpy(np.asarray(M[rows, columns]).reshape(-1, c, c)) for M in (G, H)]
        made.append(Groups(numbers[torch.from_numpy(places)], *_matrices(*blocks)))
    return tuple(made)


def _written_out(push: Map, p: int, numbers: Tensor) -> tuple[Any, Any]:
    """The rows of ``E^T`` and of ``E^T T`` for some numbers, ``[len(numbers), n^2]``."""
    import scipy.sparse

    n = push(torch.zeros(p, dtype=torch.float64)).shape[-1]
    parts = []
    for some in numbers.split(max(1, _CHUNK // max(p, n * n))):
        units = torch.zeros(len(some), p, dtype=torch.float64)
        units[torch.arange(len(some)), some] = 1
        rows = push(units).flatten(1)
        parts.append(scipy.sparse.csr_array(torch.where(_vanishes(rows), 0, rows).numpy()))
    E: Any = scipy.sparse.vstack(parts, format="csr")
    if E.nnz > _DENSE * len(numbers) * n * n:
        E = E.toarray()
    return E, E[:, np.arange(n * n).reshape(n, n).T.ravel()]


def _matrices(G: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
    """``G^+`` and ``G^{-1/2} ((I + G^{-1/2} H G^{-1/2}) / 2)^+ G^{-1/2}``, ``[k, c, c]``."""
    values, vectors = torch.linalg.eigh(G)
    largest = values.amax(-1, keepdim=True)
    root = torch.where(values > _TOLERANCE * largest, values, torch.inf).rsqrt()
    Q = vectors * root[..., None, :]  # coordinates of an orthonormal basis
    half = (torch.eye(G.shape[-1], dtype=G.dtype) + Q.mT @ H @ Q) / 2
    return Q @ Q.mT, Q @ torch.linalg.pinv(half, rtol=_TOLERANCE, hermitian=True) @ Q.mT
