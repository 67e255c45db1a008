"""Small versions of the language models that people train."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.nets import Block

HEADS = 4


def small_normal(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.02 * torch.randn(*shape))


class BERT(nn.Module):
    """An encoder, normalized first, that sees both sides."""

    def __init__(self, width: int, depth: int, tokens: int, length: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(tokens, width), small_normal(length, width)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.blocks = nn.Sequential(*[Block(width, HEADS, causal=False) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x) + self.position[: x.shape[1]])))


class T5(nn.Module):
    """One layer of an encoder and one of a decoder, which share an embedding."""

    def __init__(self, width: int, tokens: int, length: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(tokens, width), small_normal(length, width)
        nn.init.normal_(self.embed.weight, std=0.02)
        options = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        self.encode = nn.TransformerEncoderLayer(width, HEADS, 2 * width, **options)
        self.decode = nn.TransformerDecoderLayer(width, HEADS, 2 * width, **options)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens)

    def forward(self, seen: Tensor, before: Tensor) -> Tensor:
        source, target = (self.embed(x) + self.position[: x.shape[1]] for x in (seen, before))
        mask = nn.Transformer.generate_square_subsequent_mask(before.shape[1])
        y = self.decode(target, self.encode(source), tgt_mask=mask, tgt_is_causal=True)
        return self.head(self.norm(y))


class LSTM(nn.Module):
    """One recurrent layer."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(tokens, width), nn.LSTM(width, 96, batch_first=True)
        self.head = nn.Sequential(nn.Linear(96, width), nn.GELU(), nn.Linear(width, tokens))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(x))[0])


def rotated_by_place(x: Tensor) -> Tensor:
    """Rotary embeddings: pairs of entries of ``[N, heads, P, d]``, turned by their place."""
    places, half = torch.arange(x.shape[-2]), x.shape[-1] // 2
    angles = places[:, None] / 1000 ** (torch.arange(half) / half)
    a, b = x.split(half, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


class LlamaBlock(nn.Module):
    """Attention with rotary embeddings and a gated network, without biases."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width, False), nn.Linear(width, width, False)
        self.gate, self.up = (nn.Linear(width, 2 * width, False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, False)
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotated_by_place(q), rotated_by_place(k)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """A decoder whose head is its embedding."""

    def __init__(self, width: int, depth: int, tokens: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.blocks = nn.Sequential(*[LlamaBlock(width) for _ in range(depth)])
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, tokens, False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x))))


class Experts(nn.Module):
    """Four networks, of which every token is sent to the best two."""

    def __init__(self, width: int, count: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(width, count, False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(-1).topk(2)
        y = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows, place = (chosen == index).nonzero(as_tuple=True)
            y = y.index_add(0, rows, weights[rows, place, None] * expert(tokens[rows]))
        return y.view_as(x)


class MixtureOfExperts(nn.Module):
    """A causal block, and a layer of experts."""

    def __init__(self, width: int, tokens: int, length: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(tokens, width), small_normal(length, width)
        self.block, self.experts = Block(width, HEADS, causal=True), Experts(width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.embed(x) + self.position[: x.shape[1]])
        return self.head(self.norm2(x + self.experts(self.norm1(x))))


class Adapted(nn.Module):
    """A linear layer that is frozen, beside a product of two thin ones (Hu et al., 2021)."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, rank, False)
        self.up = nn.Linear(rank, layer.out_features, False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 2.0 * self.up(self.down(x))


def with_adapters(model: nn.Module, rank: int) -> nn.Module:
    """A frozen copy of a model, with an adapter on every linear layer."""
    model = copy.deepcopy(model).requires_grad_(False)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(parent, name, Adapted(layer, rank))
    return model
