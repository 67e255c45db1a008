"""A run that is saved, loaded afresh and continued is the run that was not stopped."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from singd import convert
from singd.testing.conformance.training import tensors
from structured import Diagonal
from tests.singd.paper import KFAC, SINGD
from tests.singd.runs import Snapshot, batches, mean_loss, mlp, snapshot


class Net(nn.Module):
    """Preconditioned layers, two of equal shape, a normalization for AdamW, and dropout."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = (nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
        self.layers = nn.Sequential(*layers, nn.Dropout(0.2)).to(dtype)

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
    "factors in 24 and 8 bits": lambda m: SINGD(
        m, T=2, alpha1=0.5, preconditioner_dtype=("int8", "bfloat16+8"), seed=3
    ),
    "T by group": lambda m: SINGD(
        m,
        [{"params": m.layers[:2].parameters()}, {"params": m.layers[2:].parameters(), "T": 2}],
        T=3,
        alpha1=0.9,
        weight_decay=0.01,
        structures=("block_upper(dense, lower_toeplitz, 2)", "block_diagonal(2)"),
        adamw={"lr": 0.01, "amsgrad": True},
    ),
    "lr_cov as a function": lambda m: SINGD(m, T=2, lr_cov=lambda step: 0.1 / (1 + step)),
    "KFAC": lambda m: KFAC(m, T=2, lr=0.05),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", [0, 1, 3, 4])
def test_resuming_is_bit_for_bit(method: str, dtype: torch.dtype, stop: int) -> None:
    torch.manual_seed(5)
    whole = Net(dtype)
    optimizer = METHODS[method](whole)
    steps(whole, optimizer, 0, 7, dtype)

    torch.manual_seed(5)
    first = Net(dtype)
    before = METHODS[method](first)
    steps(first, before, 0, stop, dtype)
    state = {"model": first.state_dict(), "optimizer": before.state_dict()}
    saved = through_a_file(state | {"random": torch.get_rng_state()})
    torch.manual_seed(6)
    second = Net(dtype)
    after = METHODS[method](second)
    second.load_state_dict(saved["model"])
    after.load_state_dict(saved["optimizer"])
    assert raw(snapshot(second, after)) == raw(snapshot(first, before))
    torch.set_rng_state(saved["random"])
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
    memory = {t.untyped_storage().data_ptr() for t in tensors(state) if t.numel()}
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
    "another depth": (
        lambda: SINGD(deeper(), T=1),
        r"expected 6 parameters, got 4 \(missing: 3.weight, 3.bias; unknown: none\)",
    ),
    "another order": (
        lambda: SINGD((m := mlp()), [*m[2].parameters(), *m[0].parameters()]),
        r"expected 2.weight, got 0.weight: another order",
    ),
    "another method": (lambda: KFAC(mlp(), T=1), r"expected structures = None, got \("),
    "fewer groups": (
        lambda: SINGD(
            (m := mlp()), [{"params": p} for p in (m[0].parameters(), m[2].parameters())]
        ),
        r"expected 2 groups, got 1",
    ),
}


@pytest.mark.filterwarnings("ignore:.*no backward pass was seen")
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


# Faults ------------------------------------------------------------------------------------------


def in_state(number: int, key: str, change: Any) -> Any:
    def apply(saved: dict[str, Any]) -> None:
        saved["state"][number][key] = change(saved["state"][number][key])

    return apply


def in_group(index: int, key: str, value: Any) -> Any:
    def apply(saved: dict[str, Any]) -> None:
        saved["param_groups"][index][key] = value

    return apply


def without(saved: dict[str, Any], *path: Any) -> None:
    *path, last = path
    for key in path:
        saved = saved[key]
    del saved[last]


WRONG_VALUES: dict[str, Any] = {
    "text": lambda value: "1.0",
    "a number": lambda value: 1.0,
    "nothing": lambda value: None,
    "integers": lambda value: torch.zeros(7, dtype=torch.int64),
    "another shape": lambda value: torch.zeros(2, 3, 5),
    "a list": lambda value: [torch.zeros(2)],
    "texts": lambda value: {0: "1.0"},
    "a mapping": lambda value: {"a": torch.zeros(2)},
}
WRONG_OPTIONS: dict[str, list[Any]] = {
    "lr": [-1.0, "fast", None, float("nan"), float("inf")],
    "momentum": [1.0, -0.1],
    "damping": [-1e-9],
    "weight_decay": ["0"],
    "T": [0, 2.0],
    "step": [-1, 1.5, None],
    "loss_average": ["mean"],
    "kfac_approx": [None],
    "kl_clip": [-1.0],
    "lr_cov": ["0.1"],
    "alpha1": [1.0],
    "factor_clip": [2.0],
    "structures": [("dense",), ("dense", "dens"), 3],
    "preconditioner_dtype": [None],
}
FAULTS: dict[str, tuple[Any, str]] = {
    **{
        f"{key} of {name}: {what}": (in_state(number, key, change), f"{name}: expected {key}")
        for number, name, keys in (
            (0, "layers.0.weight", ("K", "C", "m_K", "momentum_buffer")),
            (7, "layers.4.bias", ("momentum_buffer",)),
            (2, "layers.1.weight", ("exp_avg", "exp_avg_sq", "step")),
        )
        for key in keys
        for what, change in WRONG_VALUES.items()
    },
    **{
        f"{key} = {value!r}": (in_group(0, key, value), f"group 0: (expected )?{key}")
        for key, values in WRONG_OPTIONS.items()
        for value in values
    },
    "the ratio of AdamW": (
        in_group(0, "adamw", {"lr_ratio": -1.0, "weight_decay": None}),
        "group 0: lr_ratio: expected a number",
    ),
    "the decay of AdamW": (
        in_group(0, "adamw", {"lr_ratio": 1.0, "weight_decay": "0"}),
        "group 0: weight_decay: expected a number",
    ),
    "what AdamW has": (in_group(0, "adamw", None), "group 0: adamw: expected lr_ratio and"),
    "K without C": (lambda s: without(s, "state", 0, "C"), r"layers\.0\.weight: expected C beside"),
    "unknown state": (
        lambda s: s["state"][1].update(S_K=torch.zeros(4, 4)),
        r"layers\.0\.bias: unknown state 'S_K'",
    ),
    "an unknown parameter": (lambda s: s["state"].update({77: {}}), "unknown parameters.*77"),
    "one parameter less": (
        lambda s: (s["param_groups"][0]["params"].pop(), s["param_groups"][0]["param_names"].pop()),
        r"group 0: expected 8 parameters, got 7 \(missing: layers\.4\.bias; unknown: none\)",
    ),
    "one parameter more": (
        lambda s: (
            s["param_groups"][0]["params"].append(8),
            s["param_groups"][0]["param_names"].append("head.weight"),
        ),
        r"group 0: expected 8 parameters, got 9 \(missing: none; unknown: head\.weight\)",
    ),
    "a group less": (lambda s: without(s, "param_groups", 0), "expected 1 groups, got 0"),
    "groups of AdamW": (
        lambda s: [without(s, "param_groups", 0, key) for key in ("kfac_like", "structures")],
        "expected the options of this optimizer's method, got none of",
    ),
    "no groups": (lambda s: s.update(param_groups=None), "expected groups"),
    "no parameters": (lambda s: without(s, "param_groups", 0, "params"), "expected groups"),
    "no state": (lambda s: without(s, "state"), "expected a mapping with 'state'"),
}


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_whatever_is_wrong_nothing_changes(used: bool) -> None:
    model, source = Net(torch.float32), Net(torch.float32)
    optimizer = SINGD(model, T=2, alpha1=0.5)
    if used:
        steps(model, optimizer, 0, 3, torch.float32)
    saving = SINGD(source, T=2, alpha1=0.5)
    steps(source, saving, 0, 2, torch.float32)
    before = state_of(model, optimizer)
    for name, (damage, message) in FAULTS.items():
        saved = copy.deepcopy(saving.state_dict())
        damage(saved)
        with pytest.raises(ValueError, match=f"load_state_dict: .*{message}"):
            optimizer.load_state_dict(saved)
        assert state_of(model, optimizer) == before, name
    optimizer.load_state_dict(saving.state_dict())
    assert state_of(model, optimizer) != before


def state_of(model: nn.Module, optimizer: Any) -> Any:
    return raw(snapshot(model, optimizer)), repr(optimizer.state_dict())


def test_options_that_a_checkpoint_lacks_are_ours() -> None:
    """Such as one of a later version."""
    model = mlp()
    saved = SINGD(model, damping=0.3).state_dict()
    del saved["param_groups"][0]["factor_clip"]
    optimizer = SINGD(model, factor_clip=0.25)
    optimizer.load_state_dict(saved)
    assert (optimizer.param_groups[0]["factor_clip"], optimizer.param_groups[0]["damping"]) == (
        0.25,
        0.3,
    )


# Files of other formats --------------------------------------------------------------------------


@pytest.mark.parametrize("method", [m for m in METHODS if m != "lr_cov as a function"])
def test_tensors_and_text_are_the_whole_state(method: str, tmp_path: Path) -> None:
    model = Net(torch.bfloat16)
    optimizer = METHODS[method](model)
    steps(model, optimizer, 0, 3, torch.bfloat16)
    state = optimizer.state_dict()
    tensors_, metadata = convert.to_tensors(state)
    safetensors.torch.save_file(tensors_, tmp_path / "a.safetensors", metadata)
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        read = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
        restored = convert.from_tensors(read, file.metadata())
    assert restored["param_groups"] == state["param_groups"]
    fresh = METHODS[method](model)
    fresh.load_state_dict(restored)
    assert raw(snapshot(model, fresh)) == raw(snapshot(model, optimizer))
