"""A run of PyPI ``singd`` 0.0.5 that was saved half way goes on here as it went on there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from singd import convert
from tests.singd.paper import KFAC, SINGD
from tests.singd.pypi_singd import COMMON, FILE, groups, network, train
from tests.singd.runs import snapshot

BARE: dict[str, Any] = {"alpha1": 0.5, "kl_clip": None, "factor_clip": None}


def resumed() -> tuple[nn.Sequential, SINGD, dict[str, Any]]:
    saved = convert.read(FILE)
    model = network()
    model.load_state_dict(saved["model"])
    optimizer = SINGD(model, groups(model), **COMMON, **BARE)
    state = convert.from_pypi(optimizer, saved["optimizer"], groups(model))
    optimizer.load_state_dict(state)
    return model, optimizer, saved


def errors(model: nn.Module, expected: dict[str, Tensor]) -> dict[str, float]:
    return {
        name: float((p - expected[name]).norm() / expected[name].norm())
        for name, p in model.state_dict().items()
    }


def test_training_goes_on() -> None:
    model, optimizer, saved = resumed()
    moved = errors(model, saved["after"])
    train(model, optimizer, saved["batches"])
    assert max(errors(model, saved["after"]).values()) < 1e-6
    assert min(moved.values()) > 1e-3
    assert {group["step"] for group in optimizer.param_groups} == {6}


@pytest.mark.parametrize("name", ["Ks", "Cs", "m_Ks", "m_Cs", "state"])
def test_everything_that_was_saved_matters(name: str) -> None:
    """Else the test above could not fail."""
    model, optimizer, saved = resumed()
    for value in saved["optimizer"][name].values():
        for t in (value.tensors() if name != "state" else value).values():
            t.mul_(0.5)
    optimizer.load_state_dict(convert.from_pypi(optimizer, saved["optimizer"], groups(model)))
    train(model, optimizer, saved["batches"])
    assert max(errors(model, saved["after"]).values()) > 1e-5


def test_the_parameters_it_takes_if_it_is_given_none() -> None:
    saved = convert.read(FILE)["optimizer"]
    model = nn.Sequential(nn.Linear(32, 4), nn.LayerNorm(4))
    options = saved["param_groups"][0] | {"params": [0, 1]}
    old = saved | {"param_groups": [options]}
    for key in ("Ks", "Cs", "m_Ks", "m_Cs"):
        old[key] = {"0": saved[key]["2"]}
    optimizer = SINGD(model, structures=("hierarchical(15, 15)", "dense"), burn_in=100)
    optimizer.load_state_dict(convert.from_pypi(optimizer, old))
    state = optimizer.state[model[0].weight]
    assert torch.equal(state["momentum_buffer"], saved["state"][0]["momentum_buffer"])
    assert torch.equal(state["K"][0][:, 15:], saved["Ks"]["2"].B)
    assert optimizer.param_groups[0]["T"] == 3
    assert optimizer.param_groups[0]["burn_in"] == 0  # there is none in PyPI's


FAULTS: dict[str, tuple[Any, str]] = {
    "half of a step": (lambda s: s.update(H_Ks={"0": None}), "between a backward pass and its"),
    "a parameter less": (
        lambda s: s["param_groups"][0]["params"].pop(),
        "expected 4 parameters, got 5",
    ),
    "a layer less": (lambda s: s["Ks"].pop("4"), "expected a layer '4', got 0, 2, 6"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused(fault: str) -> None:
    model, optimizer, saved = resumed()
    damage, message = FAULTS[fault]
    old = copy.deepcopy(saved["optimizer"])
    damage(old)
    with pytest.raises(ValueError, match=f"from_pypi: .*{message}"):
        convert.from_pypi(optimizer, old, groups(model))


def test_other_structures_are_refused() -> None:
    model = network()
    optimizer = SINGD(model, [group | {"structures": ("dense",) * 2} for group in groups(model)])
    state = convert.from_pypi(optimizer, convert.read(FILE)["optimizer"], groups(model))
    with pytest.raises(
        ValueError, match=r"expected structures = \('dense', 'dense'\), got \('hier"
    ):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("method", [SINGD, KFAC])
def test_a_state_goes_through_named_tensors_and_text(method: Any) -> None:
    """Attention too, where one parameter has the factors of several matrices."""

    def make() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.MultiheadAttention(8, 2)
        return model, method(model, T=1, lr=0.05, momentum=0.9, graft="running", kl_clip=None)

    def train_on(model: nn.Module, optimizer: Any, seed: int) -> None:
        x = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x, x, x)[0].square().mean().backward()
        optimizer.step()

    (model, optimizer), (other, resumed) = make(), make()
    train_on(model, optimizer, 1)
    other.load_state_dict(model.state_dict())
    tensors, text = convert.to_tensors(optimizer.state_dict())
    assert all(isinstance(t, Tensor) for t in tensors.values())
    resumed.load_state_dict(convert.from_tensors(tensors, text))
    train_on(model, optimizer, 2)
    train_on(other, resumed, 2)
    got, expected = snapshot(other, resumed), snapshot(model, optimizer)
    assert any(" q." in name for name in got)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_a_learning_rate_that_is_a_tensor_is_written_as_a_number() -> None:
    model = nn.Linear(3, 2)
    optimizer = SINGD(model, lr=torch.tensor(0.25), T=1)
    model(torch.ones(4, 3)).square().mean().backward()
    optimizer.step()
    saved = convert.from_tensors(*convert.to_tensors(optimizer.state_dict()))
    assert saved["param_groups"][0]["lr"] == 0.25
    optimizer.load_state_dict(saved)
