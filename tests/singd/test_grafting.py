"""Grafting: a direction of one method, and the length of another's step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tests.singd.paper import KFAC, SINGD
from tests.singd.runs import F64, batches, mean_loss, mlp, running_mean, snapshot, train

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


def lengths(graft: str | None, momentum: float, scales: Sequence[float]) -> list[dict[str, float]]:
    """The lengths of the directions of layers that do not move; losses are scaled."""
    torch.manual_seed(0)
    model = net()
    told: list[dict[str, Any]] = []
    options = OPTIONS | {"lr": 0.0, "momentum": momentum, "telemetry": told.append}
    optimizer = SINGD(model, graft=graft, **options)
    for scale, (X, y) in zip(scales, batches(len(scales)), strict=True):
        optimizer.zero_grad()
        (scale * mean_loss(model(X), y)).backward()
        optimizer.step()
    names = [name for name, entry in told[0].items() if isinstance(entry, dict)]
    return [{name: float(entry[name]["direction_norm"]) for name in names} for entry in told]


@given(
    st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=6),
    st.sampled_from([0.0, 0.3, 0.9]),
)
def test_a_length_is_relative_to_those_that_momentum_averages(
    scales: list[float], momentum: float
) -> None:
    """And so batches count as they do in an average of directions that were not scaled."""
    made, given_ = (lengths(graft, momentum, scales) for graft in (None, "running"))
    numels = {f"{name}.weight": 0 for name, _ in net().named_children()}
    for name, p in net().named_parameters():
        numels[name.rpartition(".")[0] + ".weight"] += p.numel()
    for k, own in enumerate(given_):
        for name, length in own.items():
            v = running_mean([one[name] ** 2 for one in made[: k + 1]], momentum)
            expected = 0.2 * numels[name] ** 0.5 * made[k][name] / v**0.5
            assert length == pytest.approx(expected, rel=1e-9)


def test_without_momentum_every_length_is_the_same_and_nothing_is_stored() -> None:
    ends = []
    for graft in ("auto", "running", "rms"):
        model = mlp()
        ends.append(train(model, SINGD(model, graft=graft, **OPTIONS), batches(4)))
    assert ends[0].keys() == ends[1].keys() == ends[2].keys()
    assert not any("graft" in name for name in ends[0])
    assert all(torch.equal(ends[i][name], ends[2][name]) for name in ends[0] for i in (0, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norms_are_stored_in_single_precision_at_least(dtype: torch.dtype) -> None:
    """Also of a model that is cast, and from a file in half precision."""
    model = mlp(dtype)
    optimizer = SINGD(model, graft="running", **OPTIONS | {"momentum": 0.9})
    data = batches(3, dtype=dtype)
    train(model, optimizer, data)
    wide = torch.promote_types(dtype, torch.float32)
    assert optimizer.state[model[0].weight]["graft_norm"].dtype == wide
    saved = optimizer.state_dict()
    saved["state"] = tree_map_only(Tensor, Tensor.half, saved["state"])
    optimizer.load_state_dict(saved)
    train(model, optimizer, data)
    assert optimizer.state[model[0].weight]["graft_norm"].dtype == wide
    model.to(torch.bfloat16)
    train(model, optimizer, batches(2, dtype=torch.bfloat16))
    assert optimizer.state[model[0].weight]["graft_norm"].dtype == torch.float32


def test_lengths_of_gradients_that_are_huge_or_tiny_stay_in_range() -> None:
    for scale in (1e-16, 1e16):
        model = mlp(torch.float32)
        options = OPTIONS | {"momentum": 0.9, "T": 100}
        optimizer = SINGD(model, graft="running", **options)
        for X, y in batches(3, dtype=torch.float32):
            optimizer.zero_grad()
            mean_loss(model(X), y).backward()
            for p in model.parameters():
                p.grad.mul_(scale)  # not of what the factors are made of
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.step()
            for p, q in zip(model.parameters(), before, strict=True):
                assert 0 < float((p.detach() - q).norm()) < 1
        assert optimizer.skipped == 0


@pytest.mark.parametrize("graft", ["adamw", "running"])
def test_moments_are_counted_saved_and_resumed(graft: str) -> None:
    model, other = mlp(), mlp()
    options = OPTIONS | {"momentum": 0.9}
    optimizer = SINGD(model, graft=graft, **options)
    train(model, optimizer, batches(3))
    stored = sum(
        t.numel() * t.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        for t in (value if isinstance(value, list) else [value])
    )
    assert optimizer.plan().state_bytes == stored
    fresh = SINGD(other, graft=None, **options)
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(optimizer.state_dict())
    got, expected = train(other, fresh, batches(6)[3:]), train(model, optimizer, batches(6)[3:])
    assert got.keys() == expected.keys()
    assert any({"adamw": "graft_exp_avg_sq", "running": "graft_norm"}[graft] in n for n in got)
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'running', 'rms', 'sgd', 'adamw', got 'adam'"):
        SINGD(mlp(), graft="adam")


@pytest.mark.parametrize("graft", ["adamw", "running"])
def test_a_step_that_is_skipped_leaves_the_moments(graft: str) -> None:
    model = mlp()
    optimizer = SINGD(model, graft=graft, **OPTIONS | {"momentum": 0.9})
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


@pytest.mark.parametrize("graft", ["running", "rms", "sgd", "adamw"])
@pytest.mark.parametrize("max_skipped", [1, 10])
def test_a_step_whose_lengths_are_too_long_for_their_type_is_skipped(
    graft: str, max_skipped: int
) -> None:
    """Gradients are finite, and the sums of their squares are not."""
    model = mlp(torch.float32)
    options = OPTIONS | {"momentum": 0.9, "T": 4, "max_skipped": max_skipped}
    optimizer = SINGD(model, graft=graft, **options)
    data = batches(5, dtype=torch.float32)
    train(model, optimizer, data[:2])
    before = snapshot(model, optimizer)
    optimizer.zero_grad()
    (1e22 * mean_loss(model(data[2][0]), data[2][1])).backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    if max_skipped == 1:
        with pytest.raises(FloatingPointError, match=r"weight: .*its direction is not finite"):
            optimizer.step()
    else:
        optimizer.step()
    after = snapshot(model, optimizer)
    assert optimizer.skipped == 1
    assert all(torch.equal(after[name], before[name]) for name in before)
    moved = train(model, optimizer, data[3:])
    assert all(not torch.equal(moved[name], before[name]) for name, _ in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("graft", ["running", "rms"])
@pytest.mark.parametrize("method", [SINGD, KFAC])
@pytest.mark.parametrize("entry", [0.0, 1e-5])
def test_a_direction_of_zeros_or_of_one_small_number(
    dtype: torch.dtype, graft: str, method: Any, entry: float
) -> None:
    """What gives it its length is larger than half precision has numbers for."""
    n = 300
    model = nn.Linear(n, n, bias=False, dtype=dtype)
    own = {"kfac_like": True} if method is SINGD else {}
    optimizer = method(model, graft=graft, **OPTIONS | own | {"lr": 0.5, "T": 10})
    model(torch.ones(2, n, dtype=dtype)).float().square().mean().backward()
    model.weight.grad = torch.zeros(n, n, dtype=dtype)
    model.weight.grad[0, 0] = entry
    before = model.weight.detach().clone()
    optimizer.step()
    assert optimizer.skipped == 0
    moved = float((model.weight.detach().double() - before.double()).norm())
    assert moved == pytest.approx(0.5 * 0.2 * n if entry else 0.0, rel=0.02)
