"""Every option says what it expects where it is given something else, and nothing is made then."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import float16, float32, float64, int32, nn

from singd import KFAC, SINGD
from tests.singd.runs import mlp

pytestmark = pytest.mark.filterwarnings("ignore:max_dim:DeprecationWarning")

Range = tuple[float, float, bool]  # low, high, whether high is in

NUMBERS: dict[str, Range] = {
    "lr": (0, math.inf, False),
    "momentum": (0, 1, False),
    "damping": (0, math.inf, False),
    "alpha1": (0, 1, False),
    "weight_decay": (0, math.inf, False),
    "lr_cov": (0, math.inf, False),
    "kl_clip": (0, math.inf, False),
    "factor_clip": (1e-6, 1, True),
}
INTEGERS = {"T": 1, "burn_in": 0, "sample": 1, "max_dim": 0, "seed": None, "max_skipped": 0}
CHOICES: dict[str, tuple[Any, ...]] = {
    "loss_average": (None, "batch", "batch+sequence"),
    "kfac_approx": ("expand", "reduce"),
    "kfac_like": (False, True),
    "normalize_lr_cov": (False, True),
    "keep_products": (False, True),
    "relative_damping": (False, True),
    "scale_init": (False, True),
    "decoupled_weight_decay": (False, True),
    "graft": ("auto", None, "running", "rms", "sgd", "adamw"),
}
OTHERS: dict[str, list[Any]] = {
    "structures": ["dense", ("dense",), ("dense", "dens"), {"*": "dense"}, ()],
    "wide_structure": ["diag", "dense(3)"],
    "preconditioner_dtype": [float32, (float32,), (int32, None), ("float32", None), ("int4", None)],
    "layers": [[nn.Dropout], [nn.Linear]],
    "adamw": [{"lr": -1.0}, {"betas": (0.9, 1.0)}],
    "telemetry": [1],
    "budget": [0.0, 999, True, "2 GB"],
    "places": ["nowhere", {"*": "here"}],
}
ANYTHING: set[str] = {"model", "params", "warn_unsupported", "init_grad_scale"} | {
    "process_group",  # see tests/frameworks/test_fsdp.py
    "data",
}
NO_NUMBERS = st.sampled_from(["1", (), [0.1], {}, True, 1j])
OPTIONAL = {"kl_clip", "factor_clip", "max_dim", "max_skipped"}


def refused(name: str, value: Any, expected: str, method: Any = SINGD) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{name}: expected {expected}")) as caught:
        method(mlp(), **{name: value})
    assert str(caught.value).endswith(f"got {value!r}")


@pytest.mark.parametrize("method", [SINGD, KFAC])
def test_every_option_is_checked_here(method: Any) -> None:
    known = {*NUMBERS, *INTEGERS, *CHOICES, *OTHERS, *ANYTHING}
    assert set(inspect.signature(method).parameters) <= known


@pytest.mark.parametrize("name", NUMBERS)
@given(value=st.floats() | NO_NUMBERS)
def test_numbers_have_ranges(name: str, value: Any) -> None:
    low, high, closed = NUMBERS[name]
    number = isinstance(value, float)
    if number and low <= value and (value < high or (closed and value == high)):
        optimizer = SINGD(mlp(), **{name: value})
        assert optimizer.param_groups[0][name] == value
        return
    refused(name, value, f"a number in [{low:g}, {high:g}{']' if closed else ')'}")


@pytest.mark.parametrize("name", INTEGERS)
@given(value=st.integers(-5, 5) | st.floats() | NO_NUMBERS)
def test_integers_have_bounds(name: str, value: Any) -> None:
    low = INTEGERS[name]
    assume(not (name == "max_dim" and value == {}))  # limits by name
    if isinstance(value, int) and not isinstance(value, bool) and (low is None or value >= low):
        SINGD(mlp(), **{name: value})
        return
    refused(name, value, "an integer" + ("" if low is None else f" >= {low}"))


@pytest.mark.parametrize("name", CHOICES)
@given(value=st.text() | st.none() | st.floats())
def test_choices_name_the_known(name: str, value: Any) -> None:
    if value in CHOICES[name]:
        SINGD(mlp(), **{name: value})
        return
    refused(name, value, f"one of {', '.join(map(repr, CHOICES[name]))}")


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_checked(name: str) -> None:
    for value in OTHERS[name]:
        model = mlp()
        with pytest.raises((ValueError, TypeError)):
            SINGD(model, **{name: value})
        assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", sorted(OPTIONAL))
def test_none_is_no_bound(name: str) -> None:
    SINGD(mlp(), **{name: None})


def test_what_is_right_is_taken() -> None:
    SINGD(
        mlp(),
        structures={"0.*": ["diagonal", "dense"]},
        preconditioner_dtype=(float16, float64),
        layers=[nn.LayerNorm],
        adamw={"betas": (0.5, 0.6)},
        lr_cov=lambda step: 0.1,
    )


def test_a_group_is_checked_before_it_is_added() -> None:
    model = mlp()
    optimizer = SINGD(model, model[0].parameters())
    before = repr(optimizer)
    with pytest.raises(ValueError, match=r"damping: expected a number in \[0, inf\), got -1"):
        optimizer.add_param_group({"params": model[2].parameters(), "damping": -1})
    assert repr(optimizer) == before


def test_kfac_checks_its_weight_of_new_statistics() -> None:
    refused("lr_cov", 1.5, "a number in [0, 1]", KFAC)


SET_BETWEEN_STEPS: dict[str, Any] = {
    **{"T": 0, "graft": "foo", "loss_average": "foo", "kfac_approx": "foo", "momentum": 1.5},
    **{"lr_cov": -1.0, "damping": -1.0, "factor_clip": 2.0, "structures": ("dens", "dense")},
}


@pytest.mark.parametrize("name", SET_BETWEEN_STEPS)
def test_options_that_are_set_between_steps_are_checked(name: str) -> None:
    """Before anything is changed; what is right afterwards trains on."""
    model = mlp()
    optimizer = SINGD(model, T=1)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.ones(2, 4).double()).square().sum().backward()
        optimizer.step()

    step()
    (group,) = optimizer.param_groups
    right, before = group[name], [p.detach().clone() for p in model.parameters()]
    group[name] = SET_BETWEEN_STEPS[name]
    with pytest.raises(ValueError, match=r"expected|unknown name"):
        step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    group[name] = right
    step()
