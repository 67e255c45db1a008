"""The model and the methods, with settings from the suite and the literature, not this track."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks.nets import Block
from benchmarks.optimizers import Muon
from benchmarks.track.data import Track
from singd import SINGD, KLShampoo


class GPT2(nn.Module):
    """GPT-2; its head is its embedding."""

    def __init__(self, track: Track) -> None:
        super().__init__()
        self.embed = nn.Embedding(track.vocabulary, track.width)
        self.position = nn.Embedding(track.length, track.width)
        self.blocks = nn.ModuleList(
            Block(track.width, track.heads, causal=True) for _ in range(track.depth)
        )
        self.norm = nn.LayerNorm(track.width)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                ends = name.endswith(("out.weight", "mlp.2.weight"))  # of residual branches
                nn.init.normal_(p, std=0.02 / (2 * track.depth) ** 0.5 if ends else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of ``targets [N, P]`` after ``tokens [N, P]``."""
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


BETAS = (0.9, 0.95)


def adamw(model: nn.Module, lr: float = 1.8e-3) -> Any:
    return optim.AdamW(model.parameters(), lr=lr, betas=BETAS, weight_decay=0.1)


def muon(model: nn.Module, lr: float = 3e-3) -> Any:
    inner = unwrapped(model)
    hidden = {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.1}
    return Muon(inner, lr, muon=hidden, adamw={"betas": BETAS, "weight_decay": 0.1})


def singd(model: nn.Module, lr: float = 3e-3) -> Any:
    return SINGD(model, lr=lr, weight_decay=0.1, adamw={"betas": BETAS})


def kl_shampoo(model: nn.Module, lr: float = 3e-3) -> Any:
    """Embeddings are AdamW's: their side of 50304 words would be diagonal."""
    inner = unwrapped(model)
    blocks = list(inner.blocks.parameters())
    own = KLShampoo(model, [{"params": blocks}], lr=lr, weight_decay=0.1, adamw={"betas": BETAS})
    chosen = {id(p) for p in blocks}
    rest = [p for p in inner.parameters() if id(p) not in chosen]
    return Both(own, optim.AdamW(rest, lr=lr, betas=BETAS, weight_decay=0.0))


METHODS: dict[str, Callable[..., Any]] = {
    "adamw": adamw,
    "muon": muon,
    "singd": singd,
    "kl_shampoo": kl_shampoo,
}


class Both:
    """Two optimizers as one."""

    def __init__(self, *parts: optim.Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        for part in self.parts:
            part.step()


def parts_of(optimizer: Any) -> Sequence[optim.Optimizer]:
    return getattr(optimizer, "parts", [optimizer])


def unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model
