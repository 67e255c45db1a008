"""Small versions of the image models that people train, for images of 14 or 16 pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.nets import Block


def contrastive_cnn() -> nn.Module:
    """Three convolutions and a projection head."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 32)),
    )


class ResidualBlock(nn.Module):
    """Two convolutions with batch normalization (He et al., 2016)."""

    def __init__(self, d_in: int, d_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(d_in, d_out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(d_out, d_out, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(d_out), nn.BatchNorm2d(d_out)
        self.skip = (
            nn.Identity()
            if stride == 1
            else nn.Sequential(nn.Conv2d(d_in, d_out, 1, 2, bias=False), nn.BatchNorm2d(d_out))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (y + self.skip(x)).relu()


class ResNet(nn.Module):
    """A stem and four residual blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.blocks = nn.Sequential(
            ResidualBlock(width, width, 1),
            ResidualBlock(width, 2 * width, 2),
            ResidualBlock(2 * width, 2 * width, 1),
            ResidualBlock(2 * width, 4 * width, 2),
        )
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution, and a network for every pixel (Liu et al., 2022)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x).movedim(1, -1)
        return x + (self.scale * self.mlp(self.norm(y))).movedim(-1, 1)


class ConvNeXt(nn.Module):
    """Patches of two pixels, blocks, the mean."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 2, 2)
        self.blocks = nn.Sequential(*[ConvNeXtBlock(width) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x)).mean((2, 3))))


class MixerBlock(nn.Module):
    """A network along the patches and one along the channels (Tolstikhin et al., 2021)."""

    def __init__(self, width: int, patches: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens, self.channels = (
            nn.Sequential(nn.Linear(n, 2 * n), nn.GELU(), nn.Linear(2 * n, n))
            for n in (patches, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).mT).mT
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """Patches of two pixels, blocks, the mean."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 2, 2)
        self.blocks = nn.Sequential(*[MixerBlock(width, 49) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x).flatten(2).mT)
        return self.head(self.norm(x).mean(1))


class CompactTransformer(nn.Module):
    """Convolutions make tokens, attention pools them (Hassani et al., 2021)."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(width, width, 3, 2, padding=1), nn.ReLU()),
        )
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*[Block(width, 4, causal=False) for _ in range(depth)])
        self.norm, self.pool = nn.LayerNorm(width), nn.Linear(width, 1)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.stem(x).flatten(2).mT + self.position))
        return self.head((self.pool(x).softmax(1).mT @ x)[:, 0])


def two_convolutions(d_in: int, d_out: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(d_in, d_out, 3, padding=1), nn.GroupNorm(4, d_out), nn.SiLU()),
        *(nn.Conv2d(d_out, d_out, 3, padding=1), nn.GroupNorm(4, d_out), nn.SiLU()),
    )


class UNet(nn.Module):
    """Two levels (Ronneberger et al., 2015)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down1, self.down2 = two_convolutions(3, width), two_convolutions(width, 2 * width)
        self.bottom = two_convolutions(2 * width, 2 * width)
        self.up2 = nn.ConvTranspose2d(2 * width, 2 * width, 2, 2)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.merge2 = two_convolutions(4 * width, 2 * width)
        self.merge1 = two_convolutions(2 * width, width)
        self.head = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        y = self.up2(self.bottom(F.max_pool2d(two, 2)))
        y = self.up1(self.merge2(torch.cat([y, two], 1)))
        return self.head(self.merge1(torch.cat([y, one], 1)))
