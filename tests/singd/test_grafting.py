"""Grafting: a direction of one method, and the length of another's step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.singd.paper import KFAC, SINGD
from tests.singd.runs import F64, batches, mean_loss, mlp, snapshot, train

OPTIONS: dict[str, Any] = {"T": 2, "lr": 0.05, "momentum": 0.0, "kl_clip": None}
ADAMW: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-6}


def net() -> nn.Sequential:
    grouped = nn.Conv1d(4, 6, 2, groups=2, dtype=F64)
    return nn.Sequential(nn.Unflatten(1, (4, 1)), nn.ZeroPad1d(1), grouped, nn.Flatten(), *mlp2())


def mlp2() -> tuple[nn.Module, ...]:
    head = nn.Linear(12, 3, bias=False, dtype=F64)
    return nn.Tanh(), nn.Linear(12, 12, dtype=F64), nn.Linear(12, 12, dtype=F64), head


def moves(model: nn.Sequential, optimizer: Any, X: Tensor, y: Tensor) -> dict[str, list[Tensor]]:
    """What a step adds to every parameter, layer by layer."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, [(X, y)])
    moved: dict[str, list[Tensor]] = {}
    for name, p in model.named_parameters():
        moved.setdefault(name.rpartition(".")[0], []).append(p.detach() - before[name])
    return moved


def length(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts]).norm()


def angle(a: list[Tensor], b: list[Tensor]) -> Tensor:
    a, b = (torch.cat([part.flatten() for part in parts]) for parts in (a, b))
    return a @ b / (a.norm() * b.norm())


@pytest.mark.parametrize("graft", ["sgd", "adamw"])
@pytest.mark.parametrize("method", [SINGD, KFAC])
def test_every_layer_moves_as_far_as_the_other_method_would(method: Any, graft: str) -> None:
    model, bare, other = net(), net(), net()
    optimizer = method(model, graft=graft, adamw=ADAMW, **OPTIONS)
    free = method(bare, adamw=ADAMW, **OPTIONS)
    if graft == "sgd":
        reference: Any = torch.optim.SGD(other.parameters(), lr=0.05)
    else:
        reference = torch.optim.AdamW(other.parameters(), lr=0.05, weight_decay=0.0, **ADAMW)
    for X, y in batches(4):
        for follower in (bare, other):
            follower.load_state_dict(model.state_dict())
        got, direction, wanted = (
            moves(m, o, X, y) for m, o in ((model, optimizer), (bare, free), (other, reference))
        )
        for layer in got:
            torch.testing.assert_close(length(got[layer]), length(wanted[layer]))
            torch.testing.assert_close(
                angle(got[layer], direction[layer]), torch.ones((), dtype=F64)
            )
            assert angle(got[layer], wanted[layer]) < 1 - 1e-6


@pytest.mark.parametrize("graft", ["sgd", "adamw"])
def test_without_a_gradient_nothing_moves(graft: str) -> None:
    model = mlp()
    optimizer = SINGD(model, graft=graft, **OPTIONS)
    X, y = batches(1)[0]
    model[2].bias.requires_grad_(False)
    for p in model[0].parameters():
        p.grad = torch.zeros_like(p)
    before = snapshot(model, optimizer)
    mean_loss(model[2](X.new_ones(8, 6)), y).backward()
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model[0].named_parameters(prefix="0"))
    assert torch.equal(model[2].bias, before["2.bias"])
    if graft == "sgd":
        torch.testing.assert_close(
            (model[2].weight - before["2.weight"]).norm(), 0.05 * model[2].weight.grad.norm()
        )


def test_the_bound_comes_after() -> None:
    model = mlp()
    reports: list[dict[str, Any]] = []
    optimizer = SINGD(model, graft="sgd", telemetry=reports.append, **OPTIONS | {"kl_clip": 1e-6})
    train(model, optimizer, batches(1))
    assert 0 < float(reports[0]["trust_region"]) < 1
    torch.testing.assert_close(
        reports[0]["0.weight"]["direction_norm"], reports[0]["0.weight"]["gradient_norm"]
    )


def test_moments_are_counted_saved_and_resumed() -> None:
    model, other = mlp(), mlp()
    optimizer = SINGD(model, graft="adamw", **OPTIONS)
    train(model, optimizer, batches(3))
    stored = sum(
        t.numel() * t.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        for t in (value if isinstance(value, list) else [value])
    )
    assert optimizer.plan().state_bytes == stored
    fresh = SINGD(other, graft=None, **OPTIONS)
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(optimizer.state_dict())
    got, expected = train(other, fresh, batches(6)[3:]), train(model, optimizer, batches(6)[3:])
    assert got.keys() == expected.keys()
    assert any("graft_exp_avg_sq" in name for name in got)
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match=r"graft: .*'rms', 'sgd', 'adamw', got 'adam'"):
        SINGD(mlp(), graft="adam")


def test_a_step_that_is_skipped_leaves_the_moments() -> None:
    model = mlp()
    optimizer = SINGD(model, graft="adamw", **OPTIONS)
    train(model, optimizer, batches(2))
    before = snapshot(model, optimizer)
    X, y = batches(1)[0]
    train(model, optimizer, [(X * float("nan"), y)])
    after = snapshot(model, optimizer)
    assert optimizer.skipped == 1
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_gradient_scaler_changes_no_bit() -> None:
    scaled, plain = mlp(), mlp()
    optimizer = SINGD(scaled, graft="adamw", **OPTIONS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
    for X, y in batches(3):
        optimizer.zero_grad()
        scaler.scale(mean_loss(scaled(X), y)).backward()
        scaler.step(optimizer)
        scaler.update()
    expected = train(plain, SINGD(plain, graft="adamw", **OPTIONS), batches(3))
    got = snapshot(scaled, optimizer)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
