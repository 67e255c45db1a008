"""Factors are updated in all of the first steps, and then in every T-th."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from singd import SINGD
from tests.singd.runs import batches, mlp, train


def factors(optimizer: Any) -> list[Tensor]:
    """Copies of all numbers of K and C."""
    entries = optimizer.state.values()
    return [t.clone() for entry in entries for name in "KC" for t in entry.get(name, [])]


def updated(steps: int, **options: Any) -> list[int]:
    """The steps in which factors changed."""
    model = mlp()
    optimizer = SINGD(model, **options)
    found, before = [], factors(optimizer)
    for step, batch in enumerate(batches(steps)):
        train(model, optimizer, [batch])
        after = factors(optimizer)
        if len(before) != len(after) or not all(map(torch.equal, before, after)):
            found.append(step)
        before = after
    return found


@settings(max_examples=8, deadline=None)
@given(burn_in=st.integers(0, 7), T=st.integers(1, 5))
def test_the_first_steps_update_and_then_every_T_th(burn_in: int, T: int) -> None:
    expected = [step for step in range(12) if step < burn_in or step % T == 0]
    assert updated(12, burn_in=burn_in, T=T) == expected


def ended(steps: int, **options: Any) -> list[Tensor]:
    """The weights after these steps."""
    model = mlp()
    train(model, SINGD(model, **options), batches(steps))
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("structures", [None, "auto"])
def test_while_it_lasts_it_is_T_1(structures: Any) -> None:
    same = {"structures": structures, "lr_cov": 0.2}
    found, expected = ended(6, T=50, burn_in=6, **same), ended(6, T=1, **same)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_by_default_it_takes_a_hundred_steps() -> None:
    found, expected = ended(109, T=7), ended(109, T=7, burn_in=100)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not all(map(torch.equal, found, ended(109, T=7, burn_in=99)))


def test_it_goes_on_where_it_was_saved() -> None:
    found = []
    for saved in (False, True):
        model = mlp()
        optimizer = SINGD(model, T=3, burn_in=5)
        train(model, optimizer, batches(2))
        if saved:
            state, optimizer = optimizer.state_dict(), SINGD(model)
            optimizer.load_state_dict(state)
        train(model, optimizer, batches(8)[2:])
        found.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_another_begins_where_the_group_says_so() -> None:
    model = mlp()
    optimizer = SINGD(model, T=50, burn_in=2)
    train(model, optimizer, batches(4))
    (group,) = optimizer.param_groups
    group["burn_in"] = group["step"] + 2
    found, before = [], factors(optimizer)
    for batch in batches(8)[4:]:
        train(model, optimizer, [batch])
        found.append(not all(map(torch.equal, before, factors(optimizer))))
        before = factors(optimizer)
    assert found == [True, True, False, False]


@pytest.mark.parametrize("wrong", [-1, 2.5])
def test_a_wrong_number_is_an_error_of_the_step(wrong: Any) -> None:
    model = mlp()
    optimizer = SINGD(model)
    optimizer.param_groups[0]["burn_in"] = wrong
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises((ValueError, TypeError), match="burn_in"):
        train(model, optimizer, batches(1))
    torch.testing.assert_close(before, [p.detach() for p in model.parameters()], rtol=0, atol=0)
    with pytest.raises((ValueError, TypeError), match="burn_in"):
        SINGD(mlp(), burn_in="all")  # type: ignore[arg-type]
