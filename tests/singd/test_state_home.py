"""State has one home: what is changed in ``optimizer.state`` counts, and a checkpoint holds it."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from singd import KFAC, SINGD
from tests.singd.runs import F64, batches, distance, mean_loss, mlp, snapshot, train


def started(method: Any, T: int, count: int = 5) -> tuple[Any, Any]:
    model = nn.Sequential(*mlp(), nn.LayerNorm(3, dtype=F64))
    options: dict[str, Any] = {"kl_clip": 1e-3, "graft": None}
    if method is SINGD:
        options["structures"] = ("dense", "dense")
    optimizer = method(model, lr=0.05, T=T, **options)
    train(model, optimizer, batches(count))
    return model, optimizer


def factors_of(entry: dict[str, Any]) -> list[Tensor]:
    return [t for value in entry.values() if isinstance(value, list) for t in value]


def replace(optimizer: Any, p: Tensor) -> None:
    optimizer.state = defaultdict(dict)


def replace_by_a_dict(optimizer: Any, p: Tensor) -> None:
    optimizer.state = dict(optimizer.state)


def replace_by_an_empty_dict(optimizer: Any, p: Tensor) -> None:
    optimizer.state = {}


def all_in_half_precision(optimizer: Any, p: Tensor) -> None:
    """As a hook that makes checkpoints small; counters of steps as well."""
    saved = optimizer.state_dict()
    saved["state"] = tree_map_only(Tensor, Tensor.half, saved["state"])
    optimizer.load_state_dict(saved)


def counters_in_half_precision(optimizer: Any, p: Tensor) -> None:
    for entry in optimizer.state.values():
        if "step" in entry:
            entry["step"] = entry["step"].half()


def clear(optimizer: Any, p: Tensor) -> None:
    optimizer.state.clear()


def delete(optimizer: Any, p: Tensor) -> None:
    del optimizer.state[p]


def forget_the_momentum(optimizer: Any, p: Tensor) -> None:
    del optimizer.state[p]["momentum_buffer"]


def copied(optimizer: Any, p: Tensor) -> None:
    for q in list(optimizer.state):
        optimizer.state[q] = copy.deepcopy(optimizer.state[q])


def zero_momenta(optimizer: Any, p: Tensor) -> None:
    for entry in optimizer.state.values():
        if "momentum_buffer" in entry:
            entry["momentum_buffer"].zero_()


def scale_factors(optimizer: Any, p: Tensor) -> None:
    for entry in optimizer.state.values():
        for t in factors_of(entry):
            t.mul_(2.0)


def exchange_factors(optimizer: Any, p: Tensor) -> None:
    for entry in optimizer.state.values():
        for value in entry.values():
            if isinstance(value, list):
                value[0] = 1.5 * value[0]


def other_dtype(optimizer: Any, p: Tensor) -> None:
    for entry in optimizer.state.values():
        for name, value in entry.items():
            narrow = [t.float() for t in (value if isinstance(value, list) else [value])]
            entry[name] = narrow if isinstance(value, list) else narrow[0]


CHANGES: list[Callable[[Any, Tensor], None]] = [
    *(replace, replace_by_a_dict, clear, delete, forget_the_momentum, copied, zero_momenta),
    *(scale_factors, exchange_factors, other_dtype, replace_by_an_empty_dict),
    *(all_in_half_precision, counters_in_half_precision),
]


def goes_on_from_a_checkpoint(model: Any, optimizer: Any, T: int) -> None:
    """A step later a checkpoint holds everything that the run goes on from."""
    train(model, optimizer, batches(6)[5:])
    other, resumed = started(type(optimizer), T, 0)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    ends = [train(m, o, batches(10)[6:]) for m, o in ((model, optimizer), (other, resumed))]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert all(factors_of(optimizer.state[model[i].weight]) for i in (0, 2))


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", [SINGD, KFAC])
def test_a_checkpoint_holds_what_the_run_goes_on_from(method: Any, change: Any, T: int) -> None:
    model, optimizer = started(method, T)
    change(optimizer, model[0].weight)
    goes_on_from_a_checkpoint(model, optimizer, T)


def test_a_reset_between_a_pass_and_its_step() -> None:
    model, optimizer = started(SINGD, 1)
    optimizer.zero_grad()
    X, y = batches(1)[0]
    mean_loss(model(X), y).backward()
    optimizer.state = defaultdict(dict)
    optimizer.step()
    goes_on_from_a_checkpoint(model, optimizer, 1)


def test_a_reset_is_a_fresh_optimizer() -> None:
    model, optimizer = started(SINGD, 1)
    other, fresh = started(SINGD, 1, 0)
    other.load_state_dict(model.state_dict())
    optimizer.state.clear()
    for m, o in ((model, optimizer), (other, fresh)):
        train(m, o, batches(8)[5:])
    assert distance(snapshot(model, optimizer), snapshot(other, fresh)) == 0.0


@pytest.mark.parametrize("by", ["state dict", "entries"])
@pytest.mark.parametrize("T", [1, 4])
def test_a_run_that_is_rolled_back_repeats_itself(T: int, by: str) -> None:
    model, optimizer = started(SINGD, T)
    weights = copy.deepcopy(model.state_dict())
    saved = copy.deepcopy(optimizer.state_dict())
    entries = {p: copy.deepcopy(entry) for p, entry in optimizer.state.items()}
    options = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    first = train(model, optimizer, batches(9)[5:])
    model.load_state_dict(weights)
    if by == "state dict":
        optimizer.load_state_dict(saved)
    else:
        optimizer.state.update(entries)
        optimizer.param_groups[0].update(options)
    assert distance(train(model, optimizer, batches(9)[5:]), first) == 0.0


def pop_one(entry: dict[str, Any]) -> None:
    del entry[next(name for name, value in entry.items() if isinstance(value, list))]


def wrong_shape(entry: dict[str, Any]) -> None:
    name = next(name for name, value in entry.items() if isinstance(value, list))
    entry[name] = [torch.eye(3, dtype=F64)]


@pytest.mark.parametrize("method", [SINGD, KFAC])
@pytest.mark.parametrize("spoil", [pop_one, wrong_shape])
def test_half_a_state_is_an_error_and_moves_nothing(method: Any, spoil: Any) -> None:
    model, optimizer = started(method, 1)
    spoil(optimizer.state[model[0].weight])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"0\.weight: expected (K|S_K) "):
        train(model, optimizer, batches(1))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("way", ["before", "after"])
def test_hooks_that_drop_factors_while_a_state_is_loaded(way: str) -> None:
    _, optimizer = started(SINGD, 1)
    other, fresh = started(SINGD, 1, 1)

    def without_factors(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        kept = {n: {k: v for k, v in e.items() if k not in "KC"} for n, e in state["state"].items()}
        return {**state, "state": kept}

    if way == "before":
        fresh.register_load_state_dict_pre_hook(without_factors)
    else:
        fresh.register_load_state_dict_post_hook(lambda o: o.state.clear())
    fresh.load_state_dict(optimizer.state_dict())
    assert not factors_of(fresh.state.get(other[0].weight, {}))
    goes_on_from_a_checkpoint(other, fresh, 1)
