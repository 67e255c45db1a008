"""Gradients scaled where they are used: the same step as the plain one, in little memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from singd import SINGD, scaled, stepping
from singd.scaled import Scaled

OPTIONS: dict[str, Any] = {"lr": 0.5, "T": 2, "damping": 0.1, "weight_decay": 0.01}


def model(dtype: torch.dtype) -> nn.Module:
    """Weights that share a bucket, with and without biases, and a convolution in groups."""
    torch.manual_seed(0)
    body = [nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.Flatten(), nn.Linear(64, 6)]
    equal = [nn.Linear(6, 6) for _ in range(5)]
    return nn.Sequential(*body, *equal, nn.Linear(6, 6, bias=False), nn.Linear(6, 3)).to(dtype)


def trained(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, *, caches: int, **options: Any
) -> tuple[nn.Module, SINGD]:
    """After four steps; with as many bytes of caches."""
    monkeypatch.setattr(stepping, "CACHES", caches)
    net, generator = model(dtype), torch.Generator().manual_seed(1)
    optimizer = SINGD(net, structures=("diagonal", "diagonal"), **(OPTIONS | options))
    for _ in range(4):
        X = torch.randn(8, 2, 4, 4, generator=generator).to(dtype)
        y = torch.randint(3, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(X), y).backward()
        optimizer.step()
    return net, optimizer


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Scaled]:
    """Every scaled gradient that is made."""
    found: list[Scaled] = []

    class Listed(Scaled):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            found.append(self)

    monkeypatch.setattr(stepping, "Scaled", Listed)
    return found


@pytest.mark.parametrize("piece", [1, 80, 1 << 18])
@pytest.mark.parametrize("kl_clip", [3e-5, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_step_is_the_plain_one(
    monkeypatch: pytest.MonkeyPatch,
    made: list[Scaled],
    dtype: torch.dtype,
    kl_clip: float,
    piece: int,
) -> None:
    monkeypatch.setattr(scaled, "PIECE", piece)
    ours, _ = trained(monkeypatch, dtype, caches=-1, kl_clip=kl_clip)
    assert made
    made.clear()
    plain, _ = trained(monkeypatch, dtype, caches=1 << 40, kl_clip=kl_clip)
    assert not made
    eps = torch.finfo(dtype).eps
    for p, q, old in zip(
        ours.parameters(), plain.parameters(), model(dtype).parameters(), strict=True
    ):
        assert not torch.allclose(q, old, rtol=0, atol=1e4 * eps)
        torch.testing.assert_close(p, q, rtol=0, atol=100 * eps)


def test_in_bfloat16_only_rounding_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, mine = trained(monkeypatch, torch.bfloat16, caches=-1)
    plain, theirs = trained(monkeypatch, torch.bfloat16, caches=1 << 40)
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0.02, atol=1e-3)
        a, b = (o.state[t]["momentum_buffer"].float() for o, t in ((mine, p), (theirs, q)))
        assert (a - b).norm() < 0.1 * b.norm()


def test_the_bound_goes_by_the_inner_product(
    monkeypatch: pytest.MonkeyPatch, made: list[Scaled]
) -> None:
    monkeypatch.setattr(scaled, "PIECE", 80)
    trained(monkeypatch, torch.float64, caches=-1)
    for each in made[-3:]:
        G = torch.stack(each.gradients)
        torch.testing.assert_close(each.quadratic, (each.whole() * G).sum())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_changes_where_a_gradient_is_not_finite(
    monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    net, optimizer = trained(monkeypatch, torch.float32, caches=-1)
    nn.functional.cross_entropy(net(torch.ones(2, 2, 4, 4)), torch.tensor([0, 1])).backward()
    last: Any = net[-1]
    grad: Tensor = last.weight.grad
    grad[0, 0] = bad
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step()
    assert optimizer.skipped == 1
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("option", [{"kl_clip": None}, {"graft": "sgd"}, {"telemetry": print}])
def test_it_is_left_out_where_somebody_looks_at_the_gradients(
    monkeypatch: pytest.MonkeyPatch, made: list[Scaled], option: dict[str, Any]
) -> None:
    trained(monkeypatch, torch.float32, caches=-1, lr=1e-3, **option)
    assert not made


class Twins(nn.Module):
    """The sum of two equal layers: their gradients and factors are equal."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.Linear(32, 32, bias=False) for _ in range(2))
        self.second.load_state_dict(self.first.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x) + self.second(x)
        return y


def test_each_weight_is_rounded_by_numbers_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepping, "CACHES", -1)
    monkeypatch.setattr(scaled, "PIECE", 1)
    net = Twins().bfloat16()
    wide = (torch.float32, torch.float32)  # factors that no rounding tells apart
    both = ("diagonal", "diagonal")
    optimizer = SINGD(net, structures=both, kl_clip=1e-3, preconditioner_dtype=wide)
    net(torch.randn(8, 32).bfloat16()).square().mean().backward()
    assert torch.equal(net.first.weight, net.second.weight)
    optimizer.step()
    assert not torch.equal(net.first.weight, net.second.weight)
