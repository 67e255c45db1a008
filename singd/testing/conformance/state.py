"""Rows about the state: saving, loading, copying, resetting."""

from __future__ import annotations

import copy
import io
import pickle
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from singd.testing.conformance.groups import halves
from singd.testing.conformance.training import (
    Make,
    assert_raises,
    assert_same,
    batches,
    net,
    tensors,
    train,
    trained,
    weights,
)


def there_is_state(make: Make) -> None:
    """After a step there is state; all of it is finite."""
    _, optimizer = trained(make, 1)
    state = tensors(list(optimizer.state.values()))
    assert state, "the state is empty"
    assert all(bool(t.isfinite().all()) for t in state), "the state is not finite"


def _resumed(
    make: Make, model: nn.Module, state: Any, **options: Any
) -> tuple[nn.Module, Optimizer]:
    """A copy of a model with an optimizer that has loaded a state."""
    other = net()
    other.load_state_dict(model.state_dict())
    optimizer = make(other, **options)
    optimizer.load_state_dict(copy.deepcopy(state))
    return other, optimizer


def _goes_on(
    first: tuple[nn.Module, Optimizer], second: tuple[nn.Module, Optimizer], what: str
) -> None:
    """Both train on alike."""
    rest = batches(12)[6:]
    for model, optimizer in (first, second):
        train(model, optimizer, rest)
    assert_same(weights(second[0]), weights(first[0]), what)


def round_trips(make: Make) -> None:
    """A run resumed from a state dict, or from a file of tensors alone, is the run to the bit."""
    for way in ("as it is", "saved with torch.save", "of a fresh optimizer"):
        model, optimizer = trained(make, 0 if way == "of a fresh optimizer" else 5)
        state = optimizer.state_dict()
        if way == "saved with torch.save":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        other = _resumed(make, model, state)
        _goes_on((model, optimizer), other, f"a run resumed from a state dict {way}")


def looking(make: Make) -> None:
    """A state dict is the same each time, and to ask for it changes nothing."""
    runs = []
    for looks in (False, True):
        model = net()
        optimizer = make(model)
        for batch in batches(5):
            states = [optimizer.state_dict() for _ in range(2 if looks else 0)]
            if states:
                assert_same(tensors(states[0]), tensors(states[1]), "two state dicts")
            train(model, optimizer, [batch])
        runs.append(weights(model))
    assert_same(runs[1], runs[0], "training with a look at the state dict")


def arguments_stay(make: Make) -> None:
    """Loading neither changes nor shares its argument."""
    _, optimizer = trained(make)
    state = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(state)
    other = net()
    fresh = make(other)
    fresh.load_state_dict(state)
    train(other, fresh, batches(3))
    assert_same(tensors(state), tensors(before), "the argument of load_state_dict")
    groups = state["param_groups"], before["param_groups"]
    assert [list(g) for g in groups[0]] == [list(g) for g in groups[1]], "its groups changed"


def other_models(make: Make) -> None:
    """A state of other groups is a ValueError, and changes nothing."""
    model, optimizer = trained(make)
    other = net()
    wrong = [
        make(other, halves(other)).state_dict(),
        make(other, list(other.parameters())[:3]).state_dict(),
    ]
    before = weights(model), [t.clone() for t in tensors(optimizer.state_dict())]
    for state in wrong:
        with assert_raises((ValueError,), "the state of other groups"):
            optimizer.load_state_dict(state)
    assert_same(tensors(optimizer.state_dict()), before[1], "the state after a refusal")


def names(make: Make) -> None:
    """A state saved with named parameters is loaded without names, and the other way round."""
    for saves in (False, True):
        model, other = net(), net()
        given = [
            list(m.named_parameters() if n else m.parameters())
            for m, n in ((model, saves), (other, not saves))
        ]
        optimizer = make(model, given[0])
        train(model, optimizer, batches(4))
        other.load_state_dict(model.state_dict())
        fresh = make(other, given[1])
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        _goes_on((model, optimizer), (other, fresh), "a run resumed with other names")


def other_dtypes(make: Make) -> None:
    """A state is loaded beside parameters of another data type, and takes it with the next step."""
    _, optimizer = trained(make)
    for dtype in (torch.float32, torch.bfloat16):
        model = net(dtype)
        fresh = make(model)
        fresh.load_state_dict(optimizer.state_dict())
        train(model, fresh, batches(3, dtype))
        for p in model.parameters():
            like = [t for t in tensors(fresh.state[p]) if t.shape == p.shape and t.ndim == 1]
            wrong = {t.dtype for t in like} - {dtype}
            assert not wrong, f"state of a parameter in {dtype} is in {wrong}"
            assert bool(p.isfinite().all()), "a parameter is not finite"


def resets(make: Make) -> None:
    """What is deleted from the state is made anew, or an error: it never leaves a checkpoint."""
    ways: dict[str, Callable[[Optimizer, Tensor], Any]] = {
        "replace": lambda optimizer, p: setattr(optimizer, "state", defaultdict(dict)),
        "clear": lambda optimizer, p: optimizer.state.clear(),
        "forget": lambda optimizer, p: optimizer.state.pop(p),
        "empty": lambda optimizer, p: optimizer.state.update({p: {}}),
    }
    for name, reset in ways.items():
        model, optimizer = trained(make, 5)
        reset(optimizer, next(model.parameters()))
        try:
            train(model, optimizer, batches(6)[5:])
        except (ValueError, KeyError):
            continue
        other = _resumed(make, model, optimizer.state_dict())
        what = f"a run resumed after the state was reset by {name}"
        _goes_on((model, optimizer), other, what)


def copies(make: Make) -> None:
    """A deep copy, or a pickle, together with the model goes on like the original, alone."""
    ways: dict[str, Any] = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    }
    for name, way in ways.items():
        model, optimizer = trained(make, 4)
        lr_scheduler.LambdaLR(optimizer, _constant)  # it wraps ``step``
        other = way((model, optimizer))
        assert vars(other[1]).keys() >= _public(optimizer), f"{name} lost a public attribute"
        before = weights(model)
        moved = other[0], other[1]
        train(*moved, batches(5)[4:])
        assert_same(weights(model), before, f"the original while its {name} is trained")
        train(model, optimizer, batches(5)[4:])
        _goes_on((model, optimizer), moved, f"the {name}")


def _constant(_: int) -> float:
    return 1.0


def _public(optimizer: Optimizer) -> set[str]:
    """Names of attributes, without those that schedulers wrap."""
    return {k for k in vars(optimizer) if not k.startswith("_")} - {"step"}


ROWS = (
    *(there_is_state, round_trips, looking, arguments_stay, other_models, names, other_dtypes),
    *(resets, copies),
)
