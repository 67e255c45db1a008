"""Directions of weights and biases made apart are those of both joined."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from singd import SINGD
from singd.methods import directions

Net = Callable[[], nn.Module]


class Shared(nn.Module):
    """One layer used twice, and equal layers side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(self.first(x).tanh()).tanh()).tanh())


class Projected(nn.Module):
    """Attention, whose three matrices are rows of one weight and one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None].expand(-1, 3, -1) * torch.arange(1.0, 4.0, dtype=x.dtype)[:, None]
        return self.last(self.attention(x, x, x, need_weights=False)[0]).mean(1)


def convolutions() -> nn.Module:
    layers = [nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2), nn.Tanh()]
    return nn.Sequential(*layers, nn.Conv1d(4, 4, 1, groups=2), nn.Flatten(), nn.Linear(8, 3))


NETS: dict[str, Net] = {
    "equal layers, one used twice": Shared,
    "attention": Projected,
    "convolutions, one in groups": convolutions,
}
SPECS = (
    *("diagonal", "block_diagonal(2)", "block_diagonal(3)", "hierarchical(1, 2)", "dense"),
    *("scaled_identity", "block_upper(dense, diagonal, 2)", "strided(diagonal, dense, 3)"),
)
LENGTHS = ("running", "rms", "sgd", "adamw", "kl_clip", "kl_clip and rms")


def trained(net: str, spec: tuple[str, str], length: str, frozen: bool) -> list[Tensor]:
    """Weights after a few steps; a bias may lack a gradient."""
    torch.manual_seed(0)
    model = NETS[net]().double()
    if frozen:
        next(p for n, p in model.named_parameters() if n.endswith("bias")).requires_grad_(False)
    options = {"kl_clip": 1e-2 if "kl_clip" in length else None}
    options["graft"] = length.removeprefix("kl_clip").removeprefix(" and ") or None
    optimizer = SINGD(model, structures=spec, T=2, burn_in=0, **options)
    for _ in range(3):
        optimizer.zero_grad()
        x = torch.randn(8, 6, dtype=torch.float64)
        (model(x) - x[:, :3].sin()).square().mean().backward()
        optimizer.step()
    return list(model.parameters())


@given(
    st.sampled_from(list(NETS)),
    st.tuples(st.sampled_from(SPECS), st.sampled_from(SPECS)),
    st.sampled_from(LENGTHS),
    st.booleans(),
)
def test_apart_and_joined_train_alike(
    net: str, spec: tuple[str, str], length: str, frozen: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(directions, "takes_apart", lambda KK, CC: False)
        joined = trained(net, spec, length, frozen)
    for one, other in zip(trained(net, spec, length, frozen), joined, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@given(
    st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=4),
    st.sampled_from(["diagonal", "dense"]),
)
def test_layers_train_as_each_alone_whichever_of_them_have_biases(
    layers: list[tuple[int, bool]], spec: str
) -> None:
    """A bias counts as an input: matrices of one shape may be of layers with and without."""

    def train(alone: bool) -> list[Tensor]:
        torch.manual_seed(0)
        sizes = [4, *(n for n, _ in layers)]
        linear = [nn.Linear(sizes[i], n, bias=bias).double() for i, (n, bias) in enumerate(layers)]
        model = nn.Sequential(*linear)
        groups = [{"params": list(layer.parameters())} for layer in linear]
        optimizer = SINGD(model, groups if alone else None, structures=(spec, spec), T=1)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(6, 4, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
        return list(model.parameters())

    for together, alone in zip(train(alone=False), train(alone=True), strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("spec", ["diagonal", "block_diagonal(2)", "hierarchical(1, 2)"])
def test_they_are_made_apart_where_that_saves_copies(
    spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And gradients are not written to, which they may share memory with."""
    seen: list[tuple[int, ...]] = []
    apart = directions.precondition_apart

    def watched(KK: object, CC: object, G: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(tuple(G.shape))
        return apart(KK, CC, G, g)  # type: ignore[arg-type]

    monkeypatch.setattr(directions, "precondition_apart", watched)
    layer = nn.Linear(6, 3)
    optimizer = SINGD(layer, structures=(spec, spec))
    layer(torch.ones(4, 6)).square().mean().backward()
    before = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    optimizer.step()
    assert seen == [(1, 3, 6)]
    for p, gradient in zip(layer.parameters(), before, strict=True):
        assert torch.equal(p.grad, gradient)
