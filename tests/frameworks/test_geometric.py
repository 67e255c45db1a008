"""PyTorch Geometric: its own linear layer inside convolutions on graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.datasets import KarateClub
from torch_geometric.nn import GATConv, GCNConv, SAGEConv

from tests.singd.paper import SINGD


def club() -> Any:
    """The karate club: 34 members, each its own feature, in four groups; half of them labelled."""
    graph = KarateClub()[0]
    graph.train_mask = torch.arange(34) % 2 == 0
    return graph


class Net(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, graph: Any) -> Tensor:
        hidden = torch.relu(self.first(graph.x, graph.edge_index))
        return self.second(hidden, graph.edge_index)


NETS: dict[str, Any] = {
    "GCN": lambda: Net(GCNConv(34, 8), GCNConv(8, 4)),
    "GAT": lambda: Net(GATConv(34, 8, heads=2), GATConv(16, 4, concat=False)),
    "SAGE": lambda: Net(SAGEConv(34, 8), SAGEConv(8, 4)),
}
TRAINED_BY_ADAMW = {
    "GCN": {"first.bias", "second.bias"},
    "GAT": {f"{i}.{n}" for i in ("first", "second") for n in ("att_src", "att_dst", "bias")},
    "SAGE": set(),
}


@pytest.mark.parametrize("name", NETS)
def test_nodes_are_classified(name: str) -> None:
    graph, net = club(), NETS[name]()
    optimizer = SINGD(net, lr=0.1, T=1, kl_clip=1e-2, adamw={"lr": 1e-2})
    rules = {row.parameter: row.rule for row in optimizer.plan().rows}
    assert set(rules.values()) <= {"SINGD", "AdamW"}
    assert {p for p, rule in rules.items() if rule == "AdamW"} == TRAINED_BY_ADAMW[name]
    for _ in range(60):
        optimizer.zero_grad()
        optimizer.count_terms(graph.train_mask.sum())
        output = net(graph)[graph.train_mask]
        nn.functional.cross_entropy(output, graph.y[graph.train_mask]).backward()
        optimizer.step()
    right = net(graph).argmax(1) == graph.y
    assert bool(right[graph.train_mask].all())
    assert float(right.float().mean()) > 0.7


@pytest.mark.parametrize("name", NETS)
def test_statistics_are_those_of_the_labelled_nodes(name: str) -> None:
    graph, net = club(), NETS[name]().double()
    graph.x = graph.x.double()
    seen: dict[Any, Any] = {}

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(lambda g: seen.update({module: (args[0], g)}))

    layers = [m for m in net.modules() if type(m).__module__ == "torch_geometric.nn.dense.linear"]
    for layer in layers:
        layer.register_forward_hook(watch)
    options = {"T": 1, "lr_cov": 1e-3, "damping": 0.1, "kfac_like": True, "factor_clip": None}
    optimizer = SINGD(net, **options)
    optimizer.count_terms(graph.train_mask.sum())
    output = net(graph)[graph.train_mask]
    nn.functional.cross_entropy(output, graph.y[graph.train_mask]).backward()
    optimizer.step()
    assert len(layers) >= 2
    for layer in layers:
        (A, B), state = seen[layer], optimizer.state[layer.weight]
        if layer.bias is not None:
            A = nn.functional.pad(A, (0, 1), value=1.0)
        for factor, S in (("K", A.mT @ A / 34), ("C", 17 * B.mT @ B)):
            # One step of IKFAC from the identity: K = I - b / 2 (S + lam I - I).
            I = torch.eye(len(S), dtype=S.dtype)
            got = 2 / 1e-3 * (I - state[factor][0]) + 0.9 * I
            torch.testing.assert_close(got, S.detach(), rtol=1e-6, atol=1e-10)


def test_a_lazy_layer_is_initialised_first() -> None:
    graph, net = club(), Net(GCNConv(-1, 8), GCNConv(8, 4))
    with pytest.raises(ValueError, match=r"first.lin.weight .* run one forward pass first"):
        SINGD(net)
    with torch.no_grad():
        net(graph)
    assert SINGD(net).plan().rows[1].rule == "SINGD"
