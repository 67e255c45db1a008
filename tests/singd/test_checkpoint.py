"""A run that is saved, loaded afresh and continued is the run that was not stopped."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from singd import KFAC, SINGD
from structured import Diagonal
from tests.singd.runs import Snapshot, batches, mean_loss, mlp, snapshot


class Net(nn.Module):
    """Preconditioned layers, two of equal shape, and a normalization for AdamW."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = (nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
        self.layers = nn.Sequential(*layers).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def steps(model: nn.Module, optimizer: Any, first: int, last: int, dtype: torch.dtype) -> None:
    for X, y in batches(last, dtype=dtype)[first:]:
        optimizer.zero_grad()
        mean_loss(model(X), y).backward()
        optimizer.step()


def through_a_file(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer)  # weights_only=True is the default


def raw(state: Snapshot) -> dict[str, tuple[torch.dtype, bytes]]:
    """Every tensor to the bit."""
    return {
        name: (t.dtype, bytes(t.contiguous().view(torch.uint8).flatten().tolist()))
        if t.ndim
        else (t.dtype, bytes(str(t.item()), "ascii"))
        for name, t in state.items()
    }


METHODS: dict[str, Any] = {
    "INGD": lambda m: SINGD(m, T=2, lr=0.05),
    "IKFAC": lambda m: SINGD(m, T=3, lr=0.05, kfac_like=True, structures=("diagonal", Diagonal)),
    "SINGD": lambda m: SINGD(m, T=2, lr=0.05, structures=("hierarchical(1, 2)", "upper_toeplitz")),
    "float32 factors": lambda m: SINGD(
        m, T=2, alpha1=0.5, preconditioner_dtype=(torch.float32,) * 2
    ),
    "bfloat16 factors": lambda m: SINGD(
        m, T=2, alpha1=0.5, preconditioner_dtype=(torch.bfloat16, None), seed=3
    ),
    "lr_cov as a function": lambda m: SINGD(m, T=2, lr_cov=lambda step: 0.1 / (1 + step)),
    "KFAC": lambda m: KFAC(m, T=2, lr=0.05),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", [0, 1, 3, 4])
def test_resuming_is_bit_for_bit(method: str, dtype: torch.dtype, stop: int) -> None:
    whole = Net(dtype)
    optimizer = METHODS[method](whole)
    steps(whole, optimizer, 0, 7, dtype)

    first = Net(dtype)
    before = METHODS[method](first)
    steps(first, before, 0, stop, dtype)
    saved = through_a_file({"model": first.state_dict(), "optimizer": before.state_dict()})
    second = Net(dtype)
    after = METHODS[method](second)
    second.load_state_dict(saved["model"])
    after.load_state_dict(saved["optimizer"])
    assert raw(snapshot(second, after)) == raw(snapshot(first, before))
    steps(second, after, stop, 7, dtype)
    assert raw(snapshot(second, after)) == raw(snapshot(whole, optimizer))


def test_float32_factors_of_bfloat16_weights_stay_float32() -> None:
    model = Net(torch.bfloat16)
    optimizer = METHODS["float32 factors"](model)
    steps(model, optimizer, 0, 2, torch.bfloat16)
    fresh = METHODS["float32 factors"](model)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    steps(model, fresh, 0, 1, torch.bfloat16)
    state = fresh.state[model.layers[0].weight]
    assert {t.dtype for name in ("K", "C", "m_K", "m_C") for t in state[name]} == {torch.float32}
    assert state["momentum_buffer"].dtype == torch.bfloat16


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    children = (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    )
    return [t for child in children for t in tensors(child)]


@pytest.mark.parametrize("method", METHODS)
def test_loading_neither_changes_nor_shares_its_argument(method: str) -> None:
    model = Net(torch.float32)
    optimizer = METHODS[method](model)
    steps(model, optimizer, 0, 2, torch.float32)
    state = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(state)
    fresh = METHODS[method](model)
    fresh.load_state_dict(state)
    steps(model, fresh, 0, 3, torch.float32)
    assert state.keys() == kept.keys()
    assert state["param_groups"] == kept["param_groups"]
    assert len(tensors(state)) == len(tensors(kept)) > 10
    assert all(torch.equal(a, b) for a, b in zip(tensors(state), tensors(kept), strict=True))
    memory = {t.untyped_storage().data_ptr() for t in tensors(state)}
    assert memory.isdisjoint(t.untyped_storage().data_ptr() for t in tensors(fresh.state_dict()))


def test_a_function_is_left_out_and_kept_by_the_optimizer_that_loads() -> None:
    model = mlp()
    saved = SINGD(model, lr_cov=lambda step: 0.1).state_dict()
    assert all("lr_cov" not in group for group in saved["param_groups"])

    def schedule(step: int) -> float:
        return 0.2

    optimizer = SINGD(model, lr_cov=schedule)
    optimizer.load_state_dict(through_a_file(saved))
    assert optimizer.param_groups[0]["lr_cov"] is schedule


def test_options_of_the_checkpoint_win() -> None:
    model = mlp()
    optimizer = SINGD(model, lr=0.1, damping=0.3)
    fresh = SINGD(model)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert fresh.param_groups[0]["lr"] == 0.1
    assert fresh.param_groups[0]["damping"] == 0.3


def wider() -> nn.Sequential:
    model = mlp()
    model[2] = nn.Linear(6, 5, dtype=torch.float64)
    return model


def deeper() -> nn.Sequential:
    return nn.Sequential(*mlp(), nn.Linear(3, 3, dtype=torch.float64))


MISMATCHES: dict[str, tuple[Any, str]] = {
    "another structure": (
        lambda: SINGD(mlp(), T=1, structures=("dense", "diagonal")),
        r"expected structures = \('dense', 'diagonal'\), got \('dense', 'dense'\)",
    ),
    "another rule": (
        lambda: SINGD(mlp(), T=1, kfac_like=True),
        r"expected kfac_like = True, got False",
    ),
    "another width": (lambda: SINGD(wider(), T=1), r"2.weight: expected .* shape .*5.*, got .*3"),
    "another depth": (lambda: SINGD(deeper(), T=1), r"expected 6 parameters, got 4"),
    "another method": (lambda: KFAC(mlp(), T=1), r"expected structures = None, got \("),
    "fewer groups": (
        lambda: SINGD(
            (m := mlp()), [{"params": p} for p in (m[0].parameters(), m[2].parameters())]
        ),
        r"expected 2 groups, got 1",
    ),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_a_mismatch_fails_before_anything_changes(case: str) -> None:
    model = mlp()
    optimizer = SINGD(model, T=1, lr=0.123)
    steps(model, optimizer, 0, 2, torch.float64)
    make, message = MISMATCHES[case]
    other = make()
    other_model = other.model
    for p in other_model.parameters():
        p.grad = torch.ones_like(p)
    other.step()
    before, groups = (
        raw(snapshot(other_model, other)),
        copy.deepcopy(other.state_dict()["param_groups"]),
    )
    with pytest.raises(ValueError, match=r"load_state_dict: .*" + message):
        other.load_state_dict(optimizer.state_dict())
    assert raw(snapshot(other_model, other)) == before
    assert other.state_dict()["param_groups"] == groups
