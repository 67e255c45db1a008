"""Small trained networks, and their curvature written out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from singd import SINGD, export
from singd.factors import Calibration, KroneckerFactors, WeightFactors
from structured import parse

Batches = list[tuple[Tensor, Tensor]]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def convolutions() -> nn.Sequential:
    """Groups, a bias that is folded in and one that is not there, normalization, packed weights."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 2, groups=2),
        nn.Tanh(),
        nn.Flatten(2),
        nn.Linear(4, 4, bias=False),
        nn.LayerNorm(4),
        Attention(4, 2, batch_first=True),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).double()


class Attention(nn.MultiheadAttention):
    """Of a sequence to itself."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # one argument
        out: Tensor = super().forward(x, x, x, need_weights=False)[0]
        return out


def data(*shape: int, batches: Sequence[int] = (7, 5), classes: int = 3) -> Batches:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(n, *shape, dtype=torch.float64, generator=generator).cumsum(-1),
            torch.randint(classes, (n,), generator=generator),
        )
        for n in batches
    ]


def trained(model: nn.Module, loader: Batches, steps: int = 5, **options: Any) -> KroneckerFactors:
    """The factors of a few steps of SINGD."""
    with SINGD(model, lr=1e-2, T=1, **options) as optimizer:
        for x, y in (loader * steps)[:steps]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        return export(optimizer)


def moments(model: nn.Sequential, x: Tensor, likelihood: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Means of ``a a^T`` and ``sum_c b b^T`` of linear layers, of columns from autograd alone."""
    values = [x]
    for layer in model:
        values.append(layer(values[-1]))
        values[-1].retain_grad()
    f = values[-1].detach()
    N, k = f.shape
    eye = torch.eye(k, dtype=f.dtype)
    if likelihood == "classification":
        p = f.softmax(-1)
        hessian = torch.diag_embed(p) - p[..., None] * p[:, None]
        values_, vectors = torch.linalg.eigh(hessian)
        roots = vectors * values_.clamp(min=0).sqrt()[:, None]
    else:
        roots = eye.expand(N, k, k)
    found = {}
    for i, layer in enumerate(model):
        if not isinstance(layer, nn.Linear):
            continue
        a = torch.cat([values[i], torch.ones(N, 1, dtype=f.dtype)], 1).detach()
        S_C = torch.zeros(layer.out_features, layer.out_features, dtype=f.dtype)
        for c in range(k):
            (b,) = torch.autograd.grad(values[-1], values[i + 1], roots[..., c], retain_graph=True)
            S_C += b.T @ b / N
        found[f"{i}.weight"] = (a.T @ a / N, S_C)
    return found


def random_factors(
    shape: Sequence[int], structures: Sequence[str], generator: torch.Generator
) -> WeightFactors:
    """Well-conditioned factors ``I + A / (2 |A|)`` of a weight without a bias, not calibrated."""
    *batch, d_out, d_in = shape
    members = []
    for spec, n in zip(structures, (d_in, d_out), strict=True):
        A = parse(spec).randn(n, batch_shape=batch, dtype=torch.float64, generator=generator)
        members.append((A / (2 * A.spectral_norm())).add_scaled_identity(1.0))
    K, C = (parse(spec) for spec in structures)
    return WeightFactors(members[0], members[1], (K, C), None, "expand", 1)


def calibrated(named: dict[str, WeightFactors], samples: int = 10) -> KroneckerFactors:
    """Factors that are said to be calibrated, without damping."""
    found = {}
    for name, one in named.items():
        zero = torch.zeros(one.K.batch_shape, dtype=torch.float64)
        ones = (zero + 1, zero + 1)
        found[name] = replace(one, calibration=Calibration(ones, ones, (zero, zero), (zero, zero)))
    return KroneckerFactors(found, samples)


def fisher(one: WeightFactors) -> Tensor:
    """``(C C^T)^-1 (x) (K K^T)^-1``, written out, without batch dimensions."""
    K, C = one.K.to_dense(), one.C.to_dense()
    return torch.kron(torch.linalg.inv(C @ C.mT), torch.linalg.inv(K @ K.mT))
