"""The models of the benchmarks, with one batch each: PyTorch alone, so any process can load it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Attention(nn.Module):
    """Multi-head attention from linear layers."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        heads = [
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        mixed = F.scaled_dot_product_attention(*heads, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block, normalized first."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.attention = Attention(width, heads, causal)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer with mean pooling."""

    def __init__(
        self, width: int, depth: int, patch: int, side: int, classes: int, heads: int = 4
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn((side // patch) ** 2, width))
        self.blocks = nn.Sequential(*[Block(width, heads, causal=False) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).mT + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))


class GPT(nn.Module):
    """A causal language model."""

    def __init__(self, width: int, depth: int, tokens: int, length: int, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*[Block(width, heads, causal=True) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x) + self.position[: x.shape[1]])))


def mlp() -> nn.Module:
    """784-512-512-10."""
    layers = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    return nn.Sequential(*layers)


def vgg() -> nn.Module:
    """Six convolutions with batch normalization and two linear layers, for 32 x 32 images."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (32, 64, 128):
        for _ in range(2):
            conv = nn.Conv2d(channels, width, 3, padding=1)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Linear(128 * 16, 256), nn.ReLU(inplace=True), nn.Linear(256, 10)]
    return nn.Sequential(*layers)


def vgg16() -> nn.Module:
    """VGG-16 with batch normalization, for 32 x 32 images."""
    layers: list[nn.Module] = []
    channels = 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            conv = nn.Conv2d(channels, width, 3, padding=1)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Linear(512, 512), nn.ReLU(inplace=True)]
    layers += [nn.Linear(512, 512), nn.ReLU(inplace=True), nn.Linear(512, 10)]
    return nn.Sequential(*layers)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "gpt": lambda: GPT(width=128, depth=4, tokens=96, length=64),
    "vit": lambda: ViT(width=256, depth=4, patch=4, side=32, classes=10),
    "vgg": vgg,
    "vgg16": vgg16,
    "vit-b16": lambda: ViT(width=768, depth=12, patch=16, side=224, classes=1000, heads=12),
    "gpt2": lambda: GPT(width=768, depth=12, tokens=50257, length=1024, heads=12),
    "gpt2-medium": lambda: GPT(width=1024, depth=24, tokens=50257, length=1024, heads=16),
}

BATCHES: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "mlp": lambda: (torch.randn(128, 784), torch.randint(10, (128,))),
    "gpt": lambda: (torch.randint(96, (16, 64)), torch.randint(96, (16, 64))),
    "vit": lambda: (torch.randn(16, 3, 32, 32), torch.randint(10, (16,))),
    "vgg": lambda: (torch.randn(64, 3, 32, 32), torch.randint(10, (64,))),
    "vgg16": lambda: (torch.randn(128, 3, 32, 32), torch.randint(10, (128,))),
    "vit-b16": lambda: (torch.randn(64, 3, 224, 224), torch.randint(1000, (64,))),
    "gpt2": lambda: (torch.randint(50257, (8, 1024)), torch.randint(50257, (8, 1024))),
    "gpt2-medium": lambda: (torch.randint(50257, (4, 1024)), torch.randint(50257, (4, 1024))),
}


def make(
    name: str, dtype: torch.dtype, seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A model and a function that runs it on its batch and returns the mean loss."""
    torch.manual_seed(seed)
    model = MODELS[name]().to(device, dtype)
    x, y = (t.to(device) for t in BATCHES[name]())
    x = x.to(dtype) if x.is_floating_point() else x

    def loss() -> Tensor:
        return F.cross_entropy(model(x).float().flatten(0, -2), y.flatten())

    return model, loss
