"""Defaults through ``to_dense``: projections onto any structure, from its writing-out alone.

Let ``E`` be the linear map from the ``p`` stored numbers to the ``n x n`` matrix (``to_dense``),
``T`` transposition, ``G = E^T E`` and ``H = E^T T E``. The orthogonal projection has the
coordinates ``G^+ E^T M``. The projection ``Pi(S)``, the ``r`` of least norm with
``P(r + r^T) = 2 P(S)``, has

    G^{-1/2} ((I + G^{-1/2} H G^{-1/2}) / 2)^+ G^{-1/2}  E^T S.

Most numbers own their places: ``G`` is diagonal there, and every transposed direction ``T E_i``
either lies in the space (``s_i = 1``) or is orthogonal to it (``s_i = 0``). Then this is just
``2 / (g_i (1 + s_i))`` times ``E^T S``: "factor two off the diagonal".
:mod:`structured._core.weights` finds out by probing, once for each structure and size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Size, Tensor
from torch.utils import _pytree as pytree

from structured._core import closed
from structured._core.member import Member
from structured._core.statics import are_fake, convert
from structured._core.stored import zero_of
from structured._core.weights import Weights, analyse

M_ = TypeVar("M_", bound=Member)

_REMEMBERED = 1024  # structures and sizes

_SHAPES: dict[tuple[Any, ...], Size] = {}
# Static tensors are known by their id, and kept beside the weights: an id may be used again.
_WEIGHTS: dict[tuple[Any, ...], tuple[Any, tuple[Tensor, ...]]] = {}


def shape(member: Member) -> Size:
    """``[*batch_shape, n, n]``, found once per layout by writing out on the meta device."""
    key = member.key(0)
    if key in _SHAPES:
        return _SHAPES[key]

    def on_meta(t: Tensor) -> Tensor:  # of its shape alone: fake tensors refuse what is not fake
        return torch.empty(t.shape, dtype=t.dtype, device="meta")

    found = member.map(on_meta).map_static(on_meta).to_dense().shape
    if not torch.compiler.is_compiling():  # a frame may not change what it has guarded
        _SHAPES[key] = found
    return found


def forget() -> None:
    """Drop what was found about structures: the next use is as the first."""
    _SHAPES.clear()
    _WEIGHTS.clear()
    closed.forget()


def orthogonal_project(member: M_, M: Tensor) -> M_:
    """``P(M)`` for ``M [..., n, n]``."""
    return _project(member, M, "orthogonal")


def project(member: M_, S: Tensor) -> M_:
    """``Pi(S)`` for a symmetric ``S [..., n, n]``."""
    return _project(member, S, "symmetric")


def _project(member: M_, M: Tensor, which: str) -> M_:
    wide = torch.promote_types(M.dtype, torch.float32)
    batch, dropped = M.shape[:-2], len(member.batch_shape)
    cores = [t.shape[dropped:] for t in member.tensors()]
    statics = member.static_tensors()
    if M.is_meta or are_fake(statics):  # without numbers to analyse
        return member.with_tensors([M.new_empty((*batch, *core)) for core in cores])
    found = _weights(member.key(dropped), *statics)
    pulled = _pull(member, cores, M.to(wide))
    solved = pulled * getattr(found, which).to(M.device, wide)
    for group in found.groups:
        index = group.numbers.to(M.device)
        mixed = getattr(group, which).to(M.device, wide) @ pulled[..., index, None]
        solved = solved.index_add(-1, index.flatten(), mixed.flatten(-3))
    return member.with_tensors([t.to(M.dtype) for t in _split(solved, cores, batch)])


def _split(flat: Tensor, cores: Sequence[Size], batch: Sequence[int]) -> list[Tensor]:
    """Coordinates ``[..., p]`` as the stored tensors."""
    sizes = [core.numel() for core in cores]
    return [
        part.reshape((*batch, *core))
        for part, core in zip(flat.split(sizes, -1), cores, strict=True)
    ]


def _push(member: Member, cores: Sequence[Size], flat: Tensor) -> Tensor:
    """``E flat``, ``[..., n, n]`` from ``[..., p]``."""
    tensors = _split(flat, cores, flat.shape[:-1])
    return (
        member.map_static(lambda t: convert(t, flat.device, flat.dtype))
        .with_tensors(tensors)
        .to_dense()
    )


def _pull(member: Member, cores: Sequence[Size], M: Tensor) -> Tensor:
    """``E^T M``, ``[..., p]`` from ``[..., n, n]``: the adjoint of ``to_dense``, by autograd."""
    p = sum(core.numel() for core in cores)
    origin = M.new_zeros(*M.shape[:-2], p)
    adjoint = torch.func.vjp(functools.partial(_push, member, cores), origin)[1]
    (pulled,) = adjoint(M)
    return pulled


def _weights(key: tuple[Any, ...], *statics: Tensor) -> Weights:
    full = (key, *map(id, statics))
    if full not in _WEIGHTS:
        if len(_WEIGHTS) == _REMEMBERED:
            del _WEIGHTS[next(iter(_WEIGHTS))]
        # Transforms, modes and autocast belong to a thread: none of them gets into what is kept.
        with ThreadPoolExecutor(1) as thread:
            _WEIGHTS[full] = thread.submit(_analyse, key, statics).result(), statics
    weights: Weights = pytree.tree_map(torch.from_numpy, _WEIGHTS[full][0])
    return weights


# What torch.compiler.assume_constant_result does, less the import of the compiler.
_weights._dynamo_marked_constant = True  # type: ignore[attr-defined]  # an attribute of a function


@torch.no_grad()
def _analyse(key: tuple[Any, ...], statics: Sequence[Tensor]) -> Any:
    """The weights as arrays of NumPy: no fake or inference tensor is kept."""
    template: Member = zero_of(key, statics)
    cores = [t.shape for t in template.tensors()]
    push = functools.partial(_push, template, cores)
    pull = functools.partial(_pull, template, cores)
    found = analyse(push, pull, sum(core.numel() for core in cores))
    return pytree.tree_map(lambda t: t.numpy(), found)
