"""Few data and smooth functions: graphs, a differential equation, a regression."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import networkx
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.suite.autoencoders import network
from benchmarks.suite.sampling import rows
from benchmarks.suite.task import Batch, Task

# Graphs ------------------------------------------------------------------------------------------


class GraphAttention(nn.Module):
    """Nodes attend to their neighbours (Velickovic et al., 2018), as masked dot products."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(1, width)
        self.attend = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(3))
        self.update = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.head, self.heads = network(width, width, 1), heads

    def forward(self, edges: Tensor, nodes: Tensor) -> Tensor:
        x = self.embed(edges.sum(-1, keepdim=True))
        seen = (edges + torch.eye(edges.shape[-1]) > 0)[:, None]
        for attend, update in zip(self.attend, self.update, strict=True):
            q, k, v = attend(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            x = x + update(mixed.transpose(1, 2).flatten(2)).relu()
        return self.head((x * nodes[..., None]).sum(1))[:, 0]


@cache
def atlas() -> tuple[Batch, Batch]:
    """All graphs of up to seven nodes: adjacency, which nodes there are, and log(1 + triangles)."""
    graphs = [g for g in networkx.graph_atlas_g() if len(g) > 1]
    edges, nodes = torch.zeros(len(graphs), 7, 7), torch.zeros(len(graphs), 7)
    for graph, matrix, there in zip(graphs, edges, nodes, strict=True):
        there[: len(graph)] = 1
        matrix[: len(graph), : len(graph)] = torch.tensor(networkx.to_numpy_array(graph))
    triangles = torch.einsum("nij, njk, nki -> n", edges, edges, edges) / 6
    order = torch.randperm(len(graphs), generator=torch.Generator().manual_seed(0))
    whole = [t[order] for t in (edges, nodes, triangles.log1p())]
    return tuple(t[:1000] for t in whole), tuple(t[1000:] for t in whole)


def triangles(model: nn.Module, batch: Batch) -> Tensor:
    edges, nodes, target = batch
    return F.mse_loss(model(edges, nodes), target)


# A differential equation -------------------------------------------------------------------------

STEP = 0.05


def solution(points: Tensor) -> Tensor:
    x, y = points.T
    return torch.sin(math.pi * x) * torch.sin(math.pi * y)


def poisson(model: nn.Module, batch: Batch) -> Tensor:
    """Residual of ``-laplace u = f`` by five-point differences, and of ``u = 0`` on the border."""
    inside, border = batch
    shifts = STEP * torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    around = model((inside[:, None] + shifts).flatten(0, 1)).view(len(inside), 4).sum(1)
    laplace = (around - 4 * model(inside)[:, 0]) / STEP**2
    residual = laplace + 2 * math.pi**2 * solution(inside)
    return residual.square().mean() + 100 * model(border).square().mean()


def error(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0])[:, 0], solution(batch[0]))


def points(seed: int, size: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        inside, border = torch.rand(2, size, 2, generator=generator)
        side = torch.arange(size) % 4
        border[torch.arange(size), side // 2] = (side % 2).float()
        yield inside, border


def grid() -> list[Batch]:
    line = torch.linspace(0, 1, 33)
    return [(torch.cartesian_prod(line, line),)]


# A regression ------------------------------------------------------------------------------------


@cache
def diabetes() -> tuple[Batch, Batch]:
    """442 patients, ten features, one number: all of mean 0 and variance 1."""
    x, y = (torch.tensor(t, dtype=torch.float32) for t in load_diabetes(return_X_y=True))
    x, y = x / x.std(0), ((y - y.mean()) / y.std())[:, None]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return (x[order[:300]], y[order[:300]]), (x[order[300:]], y[order[300:]])


def squares(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


TASKS: dict[str, Task] = {
    "PINN, finite differences": Task(
        "development",
        lambda: network(2, 32, 32, 32, 1, act=nn.Tanh),
        points,
        grid,
        poisson,
        error,
        steps=400,
        batch=64,
    ),
    "regression on 442 rows": Task(
        "development",
        lambda: network(10, 32, 32, 1),
        lambda seed, size: rows(seed, size, *diabetes()[0]),
        lambda: [diabetes()[1]],
        squares,
        steps=150,
    ),
    "graph attention": Task(
        "held out",
        lambda: GraphAttention(32),
        lambda seed, size: rows(seed, size, *atlas()[0]),
        lambda: [atlas()[1]],
        triangles,
        steps=200,
        batch=64,
    ),
}
