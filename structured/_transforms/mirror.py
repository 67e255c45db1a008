"""Rows in pairs that mirror each other, as sums and differences: an orthonormal basis."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_HALF = math.sqrt(0.5)


def mirror(X: Tensor) -> Tensor:
    """``Q^T X`` for ``X [..., n, m]``: sums of rows i and n - 1 - i, the middle, differences."""
    n, h = X.shape[-2], X.shape[-2] // 2
    top, middle, bottom = X[..., :h, :], X[..., h : n - h, :], X[..., n - h :, :]
    turned = bottom.flip(-2)
    return torch.cat([_HALF * (top + turned), middle, _HALF * (top - turned)], -2)


def unmirror(Y: Tensor) -> Tensor:
    """``Q Y``, the inverse of :func:`mirror`."""
    n, h = Y.shape[-2], Y.shape[-2] // 2
    sums, middle, differences = Y[..., :h, :], Y[..., h : n - h, :], Y[..., n - h :, :]
    bottom = _HALF * (sums - differences)
    return torch.cat([_HALF * (sums + differences), middle, bottom.flip(-2)], -2)
