"""Defaults through ``to_dense``: projections onto any structure, from its writing-out alone.

Let ``E`` be the linear map from the ``p`` stored numbers to the ``n x n`` matrix (``to_dense``),
``T`` transposition, ``G = E^T E`` and ``H = E^T T E``. The orthogonal projection has the
coordinates ``G^+ E^T M``. The projection ``Pi(S)``, the ``r`` of least norm with
``P(r + r^T) = 2 P(S)``, has

    G^{-1/2} ((I + G^{-1/2} H G^{-1/2}) / 2)^+ G^{-1/2}  E^T S.

If each number owns its places, ``G = diag(g)``. If in addition every transposed direction ``T E_i``
either lies in the space (``s_i = 1``) or is orthogonal to it (``s_i = 0``), this is just
``2 / (g_i (1 + s_i))`` times ``E^T S``: "factor two off the diagonal". Both conditions are read off
one random vector (``s = (G^{-1} H)^2 r / r``) once for each structure and size; otherwise the
``p x p`` matrices are formed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Size, Tensor

if TYPE_CHECKING:
    from structured._core.matrix import StructuredMatrix

    M_ = TypeVar("M_", bound=StructuredMatrix)

_TOLERANCE = 1e-9
_REMEMBERED = 1024  # structures and sizes


class Weights(NamedTuple):
    """What turns ``E^T M`` into coordinates: vectors ``[p]`` or matrices ``[p, p]``, float64."""

    orthogonal: Tensor
    symmetric: Tensor


_SHAPES: dict[tuple[Any, ...], Size] = {}
# Static tensors are known by their id, and kept beside the weights: an id may be used again.
_WEIGHTS: dict[tuple[Any, ...], tuple[Weights, tuple[Tensor, ...]]] = {}


def shape(member: StructuredMatrix) -> Size:
    """``[*batch_shape, n, n]``, found once per layout by writing out on the meta device."""
    key = _key(member, 0)
    if key not in _SHAPES:
        meta = member.map(lambda t: torch.empty_like(t, device="meta"))
        _SHAPES[key] = meta._with_static(lambda t: t.to("meta")).to_dense().shape
    return _SHAPES[key]


def orthogonal_project(member: M_, M: Tensor) -> M_:
    """``P(M)`` for ``M [..., n, n]``."""
    return _solve(member, M, "orthogonal")


def project(member: M_, S: Tensor) -> M_:
    """``Pi(S)`` for a symmetric ``S [..., n, n]``."""
    return _solve(member, S, "symmetric")


def _solve(member: M_, M: Tensor, which: str) -> M_:
    wide = torch.promote_types(M.dtype, torch.float32)
    batch, dropped = M.shape[:-2], len(member.batch_shape)
    cores = [t.shape[dropped:] for t in member.tensors()]
    if M.is_meta:  # static tensors may be there too, without numbers to analyse
        return member.with_tensors([M.new_empty((*batch, *core)) for core in cores])
    found = _weights(_key(member, dropped), *_statics(member))
    weights: Tensor = getattr(found, which).to(M.device, wide)
    pulled = _pull(member, cores, M.to(wide))
    diagonal = weights.ndim == 1
    solved = pulled * weights if diagonal else (weights @ pulled[..., None])[..., 0]
    return member.with_tensors([t.to(M.dtype) for t in _split(solved, cores, batch)])


def _split(flat: Tensor, cores: Sequence[Size], batch: Sequence[int]) -> list[Tensor]:
    """Coordinates ``[..., p]`` as the stored tensors."""
    sizes = [core.numel() for core in cores]
    return [
        part.reshape((*batch, *core))
        for part, core in zip(flat.split(sizes, -1), cores, strict=True)
    ]


def _push(member: StructuredMatrix, cores: Sequence[Size], flat: Tensor) -> Tensor:
    """``E flat``, ``[..., n, n]`` from ``[..., p]``."""
    tensors = _split(flat, cores, flat.shape[:-1])
    return member._with_static(lambda t: t.to(flat)).with_tensors(tensors).to_dense()


def _pull(member: StructuredMatrix, cores: Sequence[Size], M: Tensor) -> Tensor:
    """``E^T M``, ``[..., p]`` from ``[..., n, n]``: the adjoint of ``to_dense``, by autograd."""
    p = sum(core.numel() for core in cores)
    origin = M.new_zeros(*M.shape[:-2], p)
    adjoint = torch.func.vjp(functools.partial(_push, member, cores), origin)[1]
    (pulled,) = adjoint(M)
    return pulled


def _key(member: StructuredMatrix, dropped: int) -> tuple[Any, ...]:
    """A structure without its batch shape and static tensors, as a tuple of constants."""
    parts = []
    for name in member._fields:
        part = getattr(member, name)
        nested = not isinstance(part, Tensor)
        parts.append(_key(part, dropped) if nested else tuple(part.shape[dropped:]))
    statics = []
    for name in member._static:
        value = getattr(member, name)
        statics.append(value.shape if isinstance(value, Tensor) else value)
    return (type(member), tuple(parts), tuple(statics))


def _statics(member: StructuredMatrix) -> Iterator[Tensor]:
    """The static tensors, nested members flattened."""
    for name in member._fields:
        part = getattr(member, name)
        if not isinstance(part, Tensor):
            yield from _statics(part)
    for name in member._static:
        value = getattr(member, name)
        if isinstance(value, Tensor):
            yield value


def _template(key: tuple[Any, ...], statics: Iterator[Tensor]) -> StructuredMatrix:
    """The zero member with the given key, on the CPU in float64."""
    cls, parts, values = key
    built = [
        _template(part, statics)
        if part and isinstance(part[0], type)
        else torch.zeros(part, dtype=torch.float64, device="cpu")
        for part in parts
    ]
    member: StructuredMatrix = cls._unflatten(
        built,
        [next(statics).to("cpu", torch.float64) if isinstance(v, Size) else v for v in values],
    )
    return member


def _weights(key: tuple[Any, ...], *statics: Tensor) -> Weights:
    full = (key, *map(id, statics))
    if full not in _WEIGHTS:
        if len(_WEIGHTS) == _REMEMBERED:
            del _WEIGHTS[next(iter(_WEIGHTS))]
        with torch.no_grad():
            _WEIGHTS[full] = _analyse(_template(key, iter(statics))), statics
    return _WEIGHTS[full][0]


# What torch.compiler.assume_constant_result does, less the import of the compiler.
_weights._dynamo_marked_constant = True  # type: ignore[attr-defined]  # an attribute of a function


def _analyse(template: StructuredMatrix) -> Weights:
    """Find the weights of a structure on the CPU in float64."""
    cores = [t.shape for t in template.tensors()]
    p = sum(core.numel() for core in cores)
    r = torch.randn(
        p, dtype=torch.float64, generator=torch.Generator().manual_seed(0), device="cpu"
    )

    def G(flat: Tensor) -> Tensor:
        return _pull(template, cores, _push(template, cores, flat))

    def H(flat: Tensor) -> Tensor:
        return _pull(template, cores, _push(template, cores, flat).mT)

    g = G(torch.ones_like(r))
    if torch.allclose(G(r), g * r, rtol=_TOLERANCE, atol=_TOLERANCE):
        s = H(H(r) / g) / g / r  # NaN where a number has no place
        if (torch.minimum(s.abs(), (s - 1).abs()) < _TOLERANCE).all():
            return Weights(1 / g, 2 / (g * (1 + s.round())))
    basis = _push(template, cores, torch.eye(p, dtype=torch.float64, device="cpu"))
    return Weights(*_matrices(basis))


def _matrices(basis: Tensor) -> tuple[Tensor, Tensor]:
    """The two ``[p, p]`` matrices of a basis ``[p, n, n]`` whose directions overlap."""
    E, ET = basis.flatten(1), basis.mT.flatten(1)
    values, vectors = torch.linalg.eigh(E @ E.mT)
    root = torch.where(values > _TOLERANCE * values.max(), values, torch.inf).rsqrt()
    Q = vectors * root  # coordinates of an orthonormal basis, [p, p]
    B = Q.mT @ (E @ ET.mT) @ Q
    half = (torch.eye(len(B), dtype=B.dtype) + B) / 2
    return Q @ Q.mT, Q @ torch.linalg.pinv(half, rtol=_TOLERANCE, hermitian=True) @ Q.mT
