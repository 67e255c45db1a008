"""Two small models of 28 x 28 images made of linear layers and convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CNN(nn.Sequential):
    """Three convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 8, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(128, 10),
        )


class Attention(nn.Module):
    """Multi-head self-attention with a linear layer for each of q, k, v and the output."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).movedim(-2, 1) for f in self.qkv())
        heads = nn.functional.scaled_dot_product_attention(q, k, v)  # [N, heads, P, dim / heads]
        return self.proj(heads.movedim(1, -2).flatten(-2))

    def qkv(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.q, self.k, self.v


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def sincos(side: int, dim: int) -> Tensor:
    """Fixed two-dimensional position embeddings ``[side^2, dim]``."""
    frequencies = torch.logspace(0, -2, dim // 4)
    angles = torch.arange(side)[:, None] * frequencies
    one = torch.cat([angles.sin(), angles.cos()], -1)  # [side, dim / 2]
    grid = torch.broadcast_tensors(one[:, None], one[None])
    return torch.cat(grid, -1).flatten(0, 1)


class ViT(nn.Module):
    """A vision transformer on 16 patches of 7 x 7 pixels; its positions are not trained."""

    position: Tensor

    def __init__(self, dim: int = 32, heads: int = 4, depth: int = 1) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, dim, 7, stride=7)
        self.register_buffer("position", sincos(4, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(16 * dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).mT + self.position
        return self.head(self.norm(self.blocks(tokens)).flatten(1))


MODELS: dict[str, type[nn.Module]] = {"CNN": CNN, "ViT": ViT}
