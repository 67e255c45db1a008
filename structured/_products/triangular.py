"""Products of triangular blocks, whose other half is neither zero nor read."""

from __future__ import annotations

import torch
from torch import Tensor

from structured._products.in_place import add_product_, plain

_PANEL = 128  # columns of a Gram matrix; wider ones compute more that is thrown away
_LEAF = 256  # rows; in smaller blocks the zeros cost less than the calls


def tril_(L: Tensor) -> Tensor:
    """Zeros above the diagonal of ``L``, row by row as it lies in memory."""
    return L.tril_() if L.stride(-1) == 1 else L.mT.triu_().mT


def tril(L: Tensor) -> Tensor:
    """``tril(L)``; a copy first and zeros after take half the time of :func:`torch.tril`."""
    if not plain(L):
        return L.tril()
    return tril_(L.clone() if L.stride(-1) == 1 else L.mT.clone().mT)


def product(L: Tensor, X: Tensor) -> Tensor:
    """``tril(L) X`` by halves: most of what is above the diagonal is neither read nor copied."""
    h = L.shape[-1] // 2
    if L.shape[-1] <= _LEAF:
        return tril(L) @ X
    x1, x2 = X[..., :h, :], X[..., h:, :]
    y2 = L[..., h:, :h] @ x1 + product(L[..., h:, h:], x2)
    return torch.cat([product(L[..., :h, :h], x1), y2], -2)


def adjoint(L: Tensor, X: Tensor) -> Tensor:
    """``tril(L)^T X``, likewise."""
    h = L.shape[-1] // 2
    if L.shape[-1] <= _LEAF:
        return tril(L).mT @ X
    x1, x2 = X[..., :h, :], X[..., h:, :]
    y1 = adjoint(L[..., :h, :h], x1) + L[..., h:, :h].mT @ x2
    return torch.cat([y1, adjoint(L[..., h:, h:], x2)], -2)


def write_gram(out: Tensor, X: Tensor) -> None:
    """The first columns of ``2 X X^T``, on and below the diagonal; above it, anything."""
    columns = out.shape[-1]
    wide = X.is_cpu and X.dtype.itemsize > 2  # matrix units prefer one large product
    width = max(_PANEL, columns // 8) if wide else max(columns, 1)
    for i in range(0, columns, width):
        panel, rows = out[..., i:, i : i + width], X[..., i:, :]
        add_product_(panel, rows, rows[..., : panel.shape[-1], :].mT, beta=0.0, alpha=2.0)
