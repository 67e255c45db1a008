"""Sliding windows along a dimension: what Toeplitz and circulant matrices are made of."""

from __future__ import annotations

from torch import Tensor

from structured._products.in_place import transformed


def windows(t: Tensor, size: int) -> Tensor:
    """``t_{i + j}``, ``[..., count, size]``, of ``t [..., count + size - 1]``.

    A view; but within a transform of ``torch.func`` a copy, for vmap has no rule for the derivative
    of one: read in rows of one number more, copies of ``t`` slide.
    """
    if not transformed():
        return t.unfold(-1, size, 1)
    length = t.shape[-1]
    count = length - size + 1
    copies = t[..., None, :].expand(*t.shape[:-1], count + 1, length).flatten(-2)
    return copies[..., : count * (length + 1)].unflatten(-1, (count, length + 1))[..., :size]
