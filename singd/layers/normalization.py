"""Scales and shifts of normalizations as matrix products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from singd.layers.base import Layer


class Normalization(Layer):
    """Scale and shift of a normalization: for each of them a product of its own, ``[d, 1, 1]``."""

    by_sample = False  # some normalize over samples

    def __init__(self, normalize: Callable[[Any, Tensor], Tensor], channels_last: bool) -> None:
        self.normalize, self.channels_last = normalize, channels_last

    def samples_first(self, module: Any, x: Tensor, samples: int | None) -> Tensor:
        """Where channels come second the samples come first."""
        return super().samples_first(module, x, samples) if self.channels_last else x

    def shape(self, module: Any) -> tuple[int, ...]:
        """``(d, 1, 1)``."""
        return module.weight.numel(), 1, 1

    def inputs(self, module: Any, x: Tensor) -> Tensor:
        """The normalized input, ``[d, N, P, 1]``."""
        return self._split(module, self.normalize(module, x))

    def grads(self, module: Any, g: Tensor) -> Tensor:
        """``[d, N, P, 1]``."""
        return self._split(module, g)

    def _split(self, module: Any, x: Tensor) -> Tensor:
        d = module.weight.numel()
        if self.channels_last:
            N = x.shape[0] if x.ndim > module.weight.ndim else 1
            rows = x.reshape(N, x.numel() // max(N * d, 1), d)
        else:
            rows = x.reshape(*x.shape[:2], torch.Size(x.shape[2:]).numel()).mT
        return rows.movedim(-1, 0)[..., None]


def _batch_norm(m: Any, x: Tensor) -> Tensor:
    batch_statistics = m.training or m.running_mean is None
    mean, var = (None, None) if batch_statistics else (m.running_mean, m.running_var)
    return F.batch_norm(x, mean, var, training=batch_statistics, eps=m.eps)


def _layer_norm(m: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, m.normalized_shape, eps=m.eps)


def _rms_norm(m: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, list(m.normalized_shape), eps=m.eps)


def _group_norm(m: Any, x: Tensor) -> Tensor:
    return F.group_norm(x, m.num_groups, eps=m.eps)


BATCH_NORM = Normalization(_batch_norm, channels_last=False)
LAYER_NORM = Normalization(_layer_norm, channels_last=True)
RMS_NORM = Normalization(_rms_norm, channels_last=True)
GROUP_NORM = Normalization(_group_norm, channels_last=False)
