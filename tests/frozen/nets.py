"""Small models and data for the frozen runs; every model maps ``[N, ...]`` to ``[N, 3]``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from singd import Layer, register_layer

IN, OUT, ROWS = 4, 3, 12


class Pooled(nn.Module):
    """Mean over all dimensions but the first and the last one (or, of images, the second)."""

    def __init__(self, channels_last: bool = True) -> None:
        super().__init__()
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1, -2).mean(1) if self.channels_last else x.flatten(2).mean(2)


class Tied(nn.Module):
    """One layer used twice, and one whose weight two modules share."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(IN, IN), nn.Linear(IN, IN), nn.Linear(IN, 3)
        self.second.weight = self.first.weight
        self.second.bias = self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(self.first(x).tanh()).tanh()).tanh())


class Attentive(nn.Module):
    """Self-attention between two linear layers."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(IN, 2, batch_first=True, **options)
        self.last = nn.Linear(IN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.attention(x, x, x, need_weights=False)[0]).mean(1)


class Heads(nn.Module):
    """Independent products side by side: ``[heads, d_out, d_in]``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, OUT, IN) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("hoi,nhi->nho", self.weight, x)


class HeadsLayer(Layer):
    """Reads :class:`Heads` as a batch of two matrix products."""

    joins_bias = False

    def inputs(self, module: Any, x: Tensor) -> Tensor:
        return x.movedim(1, 0)[:, :, None]

    def grads(self, module: Any, g: Tensor) -> Tensor:
        return g.movedim(1, 0)[:, :, None]


register_layer(Heads, HeadsLayer())


class Unseen(nn.Module):
    """A weight that is also used where no hook sees it: AdamW takes its layer over."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(IN, 5), nn.Linear(5, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh()) + 0.1 * self.first.weight.exp().sum()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(IN, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, OUT))


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(IN, 8), nn.Tanh(), nn.Linear(8, OUT, bias=False))


def even() -> nn.Module:
    first, last = nn.Linear(IN, 8, bias=False), nn.Linear(8, OUT, bias=False)
    return nn.Sequential(first, nn.Tanh(), last)


def sequence() -> nn.Module:
    return nn.Sequential(nn.Linear(IN, 5), nn.Tanh(), nn.Linear(5, OUT), Pooled())


def convolutions(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Tanh(), Pooled(channels_last=False), nn.Linear(4, OUT))


def normalized() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(7, IN, padding_idx=0), nn.LayerNorm(IN), nn.Linear(IN, 6), nn.RMSNorm(6),
        nn.Tanh(), nn.Linear(6, OUT), Pooled(),
    )  # fmt: skip


def image_norms() -> nn.Module:
    return convolutions(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 2), nn.GroupNorm(2, 4)
    )


#: Every model with the shape of one sample; of an empty one the samples are words.
NETS: dict[str, tuple[Callable[[], nn.Module], Sequence[int]]] = {
    "mlp": (mlp, (IN,)),
    "wide": (wide, (IN,)),
    "even": (even, (IN,)),
    "sequence": (sequence, (5, IN)),
    "conv1d": (lambda: convolutions(nn.Conv1d(2, 4, 3, padding=1, stride=2)), (2, 7)),
    "conv2d": (
        lambda: convolutions(nn.Conv2d(2, 4, 3, padding="same"), nn.Conv2d(4, 4, 2)),
        (2, 5, 5),
    ),
    "conv3d": (lambda: convolutions(nn.Conv3d(1, 4, 2, dilation=2)), (1, 4, 4, 4)),
    "grouped": (
        lambda: convolutions(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 2, groups=4)),
        (4, 5, 5),
    ),
    "transposed1d": (lambda: convolutions(nn.ConvTranspose1d(2, 4, 3, stride=2)), (2, 4)),
    "transposed2d": (
        lambda: convolutions(nn.ConvTranspose2d(2, 4, 3, stride=2, groups=2)),
        (2, 3, 3),
    ),
    "attention": (Attentive, (5, IN)),
    "attention, sizes": (lambda: Attentive(kdim=IN, vdim=IN, add_bias_kv=True), (5, IN)),
    "tied": (Tied, (IN,)),
    "heads": (lambda: nn.Sequential(Heads(), nn.Flatten(), nn.Linear(6, OUT)), (2, IN)),
    "unseen": (Unseen, (IN,)),
    "norms": (normalized, ()),
    "image norms": (image_norms, (2, 6, 6)),
}


def drawn(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Multiples of 1/64 in [-1, 1]: exact in every type, whereas randn differs by processor."""
    return torch.randint(-64, 65, tuple(shape), generator=generator).double() / 64


def make(net: str, dtype: torch.dtype) -> nn.Module:
    """A model with the same weights each time."""
    model, generator = NETS[net][0](), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(drawn(p.shape, generator) / 2)
    return model.to(dtype)


def batch(net: str, step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Inputs and targets of one step."""
    generator, shape = torch.Generator().manual_seed(100 + step), NETS[net][1]
    X = drawn((ROWS, *shape), generator).to(dtype) * 2
    if not shape:
        X = torch.randint(7, (ROWS, 5), generator=generator)
    return X, drawn((ROWS, OUT), generator).to(dtype) * 2
