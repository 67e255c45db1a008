"""Five tasks with data that ships in packages: a CNN, a ViT, a GCN and a character-level GPT.

What is searched for is judged on ``"validation"`` data, what is reported on ``"test"`` data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import kneighbors_graph
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import GCNConv

from benchmarks import nets
from benchmarks.data import Digits, load
from benchmarks.models import MODELS
from benchmarks.text import python_topics
from benchmarks.training import accuracy, batches

SPLITS = ("validation", "test")


class Task(Protocol):
    """What to train, on what, and how it is judged."""

    steps: int
    loss_average: str  # as for SINGD
    terms: int | None  # of the loss, where no layer can know them
    metric: str
    higher_is_better: bool

    def model(self) -> nn.Module:
        """With weights drawn from the global generator."""

    def batches(self, split: str, steps: int, seed: int) -> Iterator[Any]:
        """Training data, for the split that will judge."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """To be minimised."""

    def score(self, model: nn.Module, split: str) -> float:
        """On data that were not trained on."""


@dataclass(frozen=True)
class DigitsTask:
    """A network of :mod:`benchmarks.models` on MNIST digits, ten epochs."""

    name: str
    steps: int = 620
    metric: str = "accuracy"
    higher_is_better: bool = True
    terms: int | None = None
    loss_average: str = "batch"

    def model(self) -> nn.Module:
        return MODELS[self.name]()

    def data(self, split: str) -> tuple[Digits, Digits]:
        return load({"validation": "validation", "test": "demo"}[split])

    def batches(self, split: str, steps: int, seed: int) -> Iterator[Any]:
        return batches(self.data(split)[0], steps, seed)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    def score(self, model: nn.Module, split: str) -> float:
        return accuracy(model, self.data(split)[1])


class Graph(NamedTuple):
    """Nodes with features ``x [N, d]`` and classes ``y [N]``, and which of them serve for what."""

    x: Tensor
    y: Tensor
    edges: Tensor
    labelled: Tensor
    held_out: dict[str, Tensor]


@cache
def digits_graph(neighbours: int = 8, per_class: int = 10, validation: int = 500) -> Graph:
    """scikit-learn's 1797 digits of 8 x 8 pixels, each joined to its nearest neighbours."""
    pixels, classes = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(classes)
    near = kneighbors_graph(pixels, neighbours).maximum(kneighbors_graph(pixels, neighbours).T)
    edges = torch.from_numpy(np.stack(near.nonzero())).long()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    rank = F.one_hot(y[order]).cumsum(0).gather(1, y[order, None])[:, 0]  # 1, 2, ... in each class
    labelled, others = order[rank <= per_class], order[rank > per_class]
    return Graph(
        x, y, edges, labelled, {"validation": others[:validation], "test": others[validation:]}
    )


class GCN(nn.Module):
    """Two graph convolutions with dropout (Kipf and Welling, ICLR 2017)."""

    def __init__(self, d_in: int, width: int, classes: int) -> None:
        super().__init__()
        self.first = GCNConv(d_in, width, cached=True)
        self.second = GCNConv(width, classes, cached=True)
        self.dropout = nn.Dropout()

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = self.dropout(self.first(self.dropout(x), edges).relu())
        return self.second(x, edges)


class GraphTask:
    """Classes of all nodes from the labels of a few; every step sees the whole graph."""

    steps = 200
    loss_average = "batch"
    terms = 100  # labelled nodes; layers see all nodes
    metric = "accuracy"
    higher_is_better = True

    def model(self) -> nn.Module:
        return GCN(64, 64, 10)

    def batches(self, split: str, steps: int, seed: int) -> Iterator[Any]:
        for _ in range(steps):
            yield digits_graph()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch.x, batch.edges)
        return F.cross_entropy(logits[batch.labelled], batch.y[batch.labelled])

    def score(self, model: nn.Module, split: str) -> float:
        graph = digits_graph()
        held_out = graph.held_out[split]
        right = model(graph.x, graph.edges).argmax(-1) == graph.y
        return right[held_out].double().mean().item()


@dataclass(frozen=True)
class TextTask:
    """The next character, from up to 64 before it."""

    spread: float = 1.0  # of the embeddings at the start: PyTorch's, or 0.02 as in GPT-2

    steps = 1000
    loss_average = "batch+sequence"
    terms = None
    metric = "nats per character"
    higher_is_better = False
    length, batch = 64, 16

    def model(self) -> nn.Module:
        model = nets.GPT(64, 2, python_topics().vocabulary, self.length)
        with torch.no_grad():
            model.embed.weight.mul_(self.spread)
        return model

    def batches(self, split: str, steps: int, seed: int) -> Iterator[Any]:
        generator, text = torch.Generator().manual_seed(seed), python_topics().train
        for _ in range(steps):
            starts = torch.randint(len(text) - self.length, (self.batch, 1), generator=generator)
            places = starts + torch.arange(self.length)
            yield text[places], text[places + 1]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        characters, following = batch
        return F.cross_entropy(model(characters).flatten(0, 1), following.flatten())

    def score(self, model: nn.Module, split: str) -> float:
        text = python_topics().held_out[split]
        count = (len(text) - 1) // self.length
        rows = [t[: count * self.length].view(count, self.length) for t in (text, text[1:])]
        pairs = zip(*(r.split(64) for r in rows), strict=True)
        total = sum(self.loss(model, pair).item() * len(pair[0]) for pair in pairs)
        return total / count


TASKS: dict[str, Task] = {
    "CNN": DigitsTask("CNN"),
    "ViT": DigitsTask("ViT"),
    "GCN": GraphTask(),
    "GPT": TextTask(),
    "GPT, embeddings 0.02": TextTask(0.02),
}
