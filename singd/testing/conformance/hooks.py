"""Rows about hooks: of a step, of all optimizers, of saving and loading."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from singd.testing.conformance.training import (
    Make,
    assert_same,
    batches,
    net,
    train,
    trained,
    weights,
)


def hooks_of_steps(make: Make) -> None:
    """Hooks of steps, its own and those of all optimizers, run once a step, in order."""
    model = net()
    optimizer = make(model)
    start, calls = weights(model), []

    def note(name: str) -> Any:
        def hook(given: Any, args: Any, kwargs: Any) -> None:
            assert given is optimizer, f"a hook was given {type(given).__name__}"
            moved = not torch.equal(weights(model)[0], start[0])
            calls.append((name, moved))

        return hook

    handles = [
        optimizer.register_step_pre_hook(note("before")),
        optimizer.register_step_post_hook(note("after")),
        register_optimizer_step_pre_hook(note("before all")),
        register_optimizer_step_post_hook(note("after all")),
    ]
    try:
        train(model, optimizer, batches(1))
    finally:
        for handle in handles:
            handle.remove()
    train(model, optimizer, batches(1))
    expected = [("before all", False), ("before", False), ("after", True), ("after all", True)]
    assert sorted(calls) == sorted(expected), f"expected the calls {expected}, got {calls}"
    assert [moved for _, moved in calls] == [False, False, True, True], f"order: {calls}"


def hooks_that_change_arguments(make: Make) -> None:
    """A hook before a step may give it other arguments."""
    model = net()
    optimizer = make(model)
    handle = optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 5.0), {}))
    got = optimizer.step(lambda: 4.0)
    handle.remove()
    assert got == 5.0, f"expected the result of the other closure, 5.0, got {got}"


def hooks_of_saving(make: Make) -> None:
    """Hooks before and after saving see the state dict, which they may replace."""
    _, optimizer = trained(make)
    plain, calls = optimizer.state_dict(), []

    def after(given: Any, state: Any) -> Any:
        calls.append("after")
        assert state.keys() == plain.keys(), f"a hook was given the keys {list(state)}"
        groups = [list(group) for group in state["param_groups"]]
        assert groups == [list(g) for g in plain["param_groups"]], "a hook was given other groups"
        return {**state, "added": 1}

    optimizer.register_state_dict_pre_hook(lambda o: calls.append("before"))
    optimizer.register_state_dict_post_hook(after)
    got = optimizer.state_dict()
    assert calls == ["before", "after"], f"calls: {calls}"
    assert got.get("added") == 1, "what a hook returned was not the state dict"

    optimizer.register_state_dict_post_hook(lambda o, state: {"only": state["added"]})
    assert optimizer.state_dict() == {"only": 1}, "what the last hook returned is not the result"


def hooks_of_loading(make: Make) -> None:
    """A hook may rewrite what is loaded, in place or as a new dict; others run before and after."""
    for way in ("as a new dict", "in place"):
        model, optimizer = trained(make, 4)
        wrapped = {"version": 2, "inner": copy.deepcopy(optimizer.state_dict())}
        other = net()
        other.load_state_dict(model.state_dict())
        fresh = make(other)
        calls = _load_by_hooks(fresh, wrapped, way)
        expected = ["first", "unpack", len(optimizer.state)]
        assert calls == expected, f"expected the calls {expected}, got {calls}"
        for each in ((other, fresh), (model, optimizer)):
            train(*each, batches(6)[4:])
        assert_same(weights(other), weights(model), f"a run whose state a hook unpacked {way}")


def _load_by_hooks(optimizer: Optimizer, wrapped: dict[str, Any], way: str) -> list[Any]:
    """Load a state that a hook has to unpack; the calls of all hooks."""
    calls: list[Any] = []

    def unpack(_: Optimizer, given: dict[str, Any]) -> dict[str, Any] | None:
        calls.append("unpack")
        if way == "as a new dict":
            return given["inner"]
        given |= given.pop("inner")
        return None

    def first(_: Optimizer, given: dict[str, Any]) -> None:
        calls.append("first")

    optimizer.register_load_state_dict_pre_hook(unpack)
    optimizer.register_load_state_dict_pre_hook(first, prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append(len(o.state)))
    optimizer.load_state_dict(wrapped)
    return calls


def hooks_that_change_state(make: Make) -> None:
    """What a hook changes in the options of a state that is loaded counts."""
    model, optimizer = trained(make, 4)
    runs = []
    for changed in (False, True):
        other = net()
        other.load_state_dict(model.state_dict())
        fresh = make(other)
        if changed:

            def rate(o: Any, state: Any) -> Any:
                groups = [{**group, "lr": 0.0} for group in state["param_groups"]]
                return {**state, "param_groups": groups}

            fresh.register_load_state_dict_pre_hook(rate)
        fresh.load_state_dict(optimizer.state_dict())
        train(other, fresh, batches(6)[4:])
        runs.append(weights(other))
    assert_same(runs[1], weights(model), "training at the rate of zero that a hook loaded")
    assert not torch.equal(runs[0][0], runs[1][0]), "without the hook nothing moved either"


ROWS = (
    *(hooks_of_steps, hooks_that_change_arguments, hooks_of_saving, hooks_of_loading),
    hooks_that_change_state,
)
