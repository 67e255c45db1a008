"""What happens when: one test per row of docs/singd/life-cycle.md.

Passes for other purposes, checkpointing, closures, accumulation and memory are in test_capture.py;
saving and loading in test_checkpoint.py.
"""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from singd.layers import OPTIONAL
from tests.singd.paper import KFAC, SINGD
from tests.singd.runs import (
    F64,
    batches,
    distance,
    factors,
    mean_loss,
    mlp,
    snapshot,
    stored,
    train,
)

FORMS: Any = ("bfloat16+8", "int8")
METHODS: dict[str, Any] = {
    "SINGD": SINGD,
    "SINGD in 24 and 8 bits": partial(SINGD, preconditioner_dtype=FORMS),
    "KFAC": KFAC,
}
I5 = torch.eye(5, dtype=F64)


def started(**options: Any) -> tuple[nn.Sequential, Any]:
    """A model and an optimizer after two steps."""
    model = mlp()
    optimizer = SINGD(model, **{"T": 1, "lr": 0.05} | options)
    train(model, optimizer, batches(2))
    optimizer.zero_grad()
    return model, optimizer


def backward(model: nn.Module, index: int = 0) -> None:
    X, y = batches(index + 1)[index]
    mean_loss(model(X), y).backward()


# Steps without all of it --------------------------------------------------------------------------


def test_a_layer_that_is_not_used_keeps_its_weight_and_factors() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = mlp(), mlp(seed=1)

        def forward(self, x: Tensor, right: bool) -> Tensor:
            return self.right(x) if right else self.left(x)

    model = Branches()
    optimizer = SINGD(model, T=1, lr=0.05)
    (X, y), *_ = batches(1)
    for right in (True, False):
        mean_loss(model(X, right), y).backward()
    optimizer.step()
    before = snapshot(model, optimizer)
    optimizer.zero_grad()
    mean_loss(model(X, False), y).backward()
    optimizer.step()
    after = snapshot(model, optimizer)
    for name, value in after.items():
        assert torch.equal(value, before[name]) == name.startswith("right"), name


@pytest.mark.parametrize("missing", [{"0.weight"}, {"0.bias"}, {"0.weight", "0.bias"}, "all"])
def test_parameters_without_a_gradient_stay(missing: Any) -> None:
    model, optimizer = started()
    backward(model)
    for name, p in model.named_parameters():
        if missing == "all" or name in missing:
            p.grad = None
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (missing == "all" or name in missing), name


@pytest.mark.parametrize("method", METHODS)
def test_a_step_before_any_backward_moves_nothing(method: str) -> None:
    model = mlp()
    optimizer = METHODS[method](model, T=1)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    model(batches(1)[0][0])  # nor does a forward pass alone
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    K = factors(optimizer, model[0].weight)["S_K" if method == "KFAC" else "K"]
    assert torch.equal(K.double(), I5)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_between_backward_and_step_forgets_the_pass(set_to_none: bool) -> None:
    model, optimizer = started(momentum=0.0)
    before = snapshot(model, optimizer)
    backward(model)
    optimizer.zero_grad(set_to_none=set_to_none)
    optimizer.step()
    assert distance(snapshot(model, optimizer), before) == 0.0


def test_both_modes_of_zero_grad_train_alike() -> None:
    runs = []
    for set_to_none in (True, False):
        model, optimizer = started()
        for index in range(3):
            optimizer.zero_grad(set_to_none=set_to_none)
            backward(model, index)
            optimizer.step()
        runs.append(snapshot(model, optimizer))
    assert distance(*runs) == 0.0


@pytest.mark.parametrize("structure", ["dense", "diagonal", "lower_toeplitz"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_an_empty_batch_changes_nothing(structure: str, approximation: str) -> None:
    nets: list[tuple[nn.Module, tuple[int, ...]]] = [
        (mlp(), (4,)),
        (mlp(), (3, 4)),
        (nn.Conv2d(4, 4, 2, groups=2, padding=1, dtype=F64), (4, 3, 3)),
        (nn.ConvTranspose1d(4, 2, 3, groups=2, bias=False, dtype=F64), (4, 5)),
        (nn.LayerNorm(4, dtype=F64), (3, 4)),
        (nn.GroupNorm(2, 4, dtype=F64), (4, 3)),
    ]
    for model, shape in nets:
        optimizer = SINGD(
            model,
            T=1,
            momentum=0.0,
            structures=(structure, structure),
            kfac_approx=approximation,
            layers=tuple(OPTIONAL),
        )
        model(torch.randn(5, *shape, dtype=F64)).exp().sum().backward()
        optimizer.step()
        before = snapshot(model, optimizer)
        optimizer.zero_grad()
        model(torch.randn(0, *shape, dtype=F64)).exp().sum().backward()
        optimizer.step()
        assert distance(snapshot(model, optimizer), before) == 0.0, model


# Freezing -----------------------------------------------------------------------------------------


def test_a_frozen_layer_stays_and_thaws_with_its_factors() -> None:
    model, optimizer = started()
    model[0].requires_grad_(False)
    before = snapshot(model, optimizer)
    train(model, optimizer, batches(2))
    frozen = snapshot(model, optimizer)
    assert all(torch.equal(frozen[k], before[k]) for k in frozen if k.startswith("0."))
    assert not torch.equal(frozen["2.weight"], before["2.weight"])
    model[0].requires_grad_(True)
    thawed = train(model, optimizer, batches(2))
    assert not any(torch.equal(thawed[k], before[k]) for k in thawed if k.startswith("0."))


def test_layers_frozen_at_construction_may_thaw_later() -> None:
    early, frozen = mlp(), mlp()
    frozen.requires_grad_(False)
    optimizers = [SINGD(m, list(m.parameters()), T=1, lr=0.05) for m in (early, frozen)]
    assert not any(p.requires_grad for p in frozen.parameters())
    frozen.requires_grad_(True)
    runs = [train(m, o, batches(3)) for m, o in zip((early, frozen), optimizers, strict=True)]
    assert distance(*runs) == 0.0


# The model changes under the optimizer ------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtypes", [(torch.float32, F64), (F64, torch.float32)])
def test_a_model_that_is_cast_takes_its_state_along(
    method: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    first, then = dtypes
    cast, straight = [nn.Sequential(*mlp(), nn.LayerNorm(3)) for _ in range(2)]
    for model, dtype in ((cast, first), (straight, F64)):
        model.to(dtype)
        optimizer = METHODS[method](model, T=1)
        train(model, optimizer, [(X.to(dtype), y.to(dtype)) for X, y in batches(2)])
        dtype = then if model is cast else F64
        model.to(dtype)
        train(model, optimizer, [(X.to(dtype), y.to(dtype)) for X, y in batches(3)])
        if model is cast:
            for p in model.parameters():
                for name, value in optimizer.state[p].items():
                    if isinstance(value, Tensor) and name != "step":
                        assert value.dtype == then, name
    for p, q in zip(cast.parameters(), straight.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-4, atol=1e-5)


def replace(model: nn.Sequential) -> None:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


def resize(model: nn.Sequential) -> None:
    model[0].weight.data, model[0].bias.data = torch.randn(7, 4).double(), torch.randn(7).double()
    model[2].weight.data = torch.randn(3, 7).double()


def resize_the_rest(model: nn.Sequential) -> None:
    model[3].weight.data = model[3].bias.data = torch.ones(1, dtype=F64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace, r"0\.weight was replaced after the optimizer was made .*assign=True"),
        (resize, r"0\.weight: expected the shape \[6, 4\] .* got \[7, 4\]"),
        (resize_the_rest, r"3\.weight: expected the shape \[3\] .* got \[1\]"),
    ],
)
@pytest.mark.parametrize("T", [1, 2])
def test_parameters_that_are_no_longer_those_it_knows_are_an_error(
    change: Callable[[nn.Sequential], None], message: str, T: int
) -> None:
    model = nn.Sequential(*mlp(), nn.LayerNorm(3, dtype=F64))
    optimizer = SINGD(model, T=T)
    train(model, optimizer, batches(1))
    optimizer.zero_grad()
    change(model)
    if change is resize_the_rest:
        model[3].normalized_shape = (1,)
        model[3].forward = lambda x: x * model[3].weight
    before = {k: v.detach().clone() for k, v in model.named_parameters()}

    def train_on() -> None:  # noticed in the pass, or in the step
        backward(model)
        optimizer.step()

    with pytest.raises(ValueError, match=message):
        train_on()
    assert all(torch.equal(v, before[k]) for k, v in model.named_parameters())


# Groups -------------------------------------------------------------------------------------------


def test_a_group_added_later_is_trained_from_then_on() -> None:
    model = mlp()
    optimizer = SINGD(model, model[0].parameters(), T=1, lr=0.05)
    before = model[2].weight.detach().clone()
    train(model, optimizer, batches(2))
    assert torch.equal(model[2].weight, before)
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.1, "T": 2})
    train(model, optimizer, batches(2))
    assert not torch.equal(model[2].weight, before)
    assert {"K", "C"} <= factors(optimizer, model[2].weight).keys()


def test_a_group_that_is_refused_leaves_no_trace() -> None:
    model = nn.Sequential(*mlp(), nn.LayerNorm(3, dtype=F64))
    optimizer = SINGD(model, [*model[0].parameters(), model[3].bias])
    refused: list[dict[str, Any]] = [
        {"params": list(model[2].parameters()), "lr": -1.0},
        {"params": [model[2].weight, model[3].bias]},
        {"params": [model[2].weight, model[2].weight]},
    ]
    plan = str(optimizer.plan())
    for group in refused:
        with pytest.raises(ValueError, match=r"lr: expected|more than one group"):
            optimizer.add_param_group(group)
        assert str(optimizer.plan()) == plan
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", 0.2),
        ("damping", 0.5),
        ("momentum", 0.0),
        ("weight_decay", 0.1),
        ("lr_cov", 0.2),
        ("T", 2),
        ("kl_clip", None),
        ("loss_average", None),
        ("alpha1", 0.5),
        ("kfac_like", True),
        ("preconditioner_dtype", (torch.float32, torch.float32)),
        ("preconditioner_dtype", FORMS),
        ("structures", ("diagonal", "diagonal")),
        ("max_dim", 4),
    ],
)
def test_an_option_that_is_changed_counts_from_then_on(option: str, value: Any) -> None:
    runs = []
    for change in (False, True):
        model, optimizer = started()
        if change:
            optimizer.param_groups[0][option] = value
        runs.append(train(model, optimizer, batches(3)))
        if option != "momentum":  # its buffers are kept, as those of torch.optim.SGD
            assert optimizer.plan().state_bytes == stored(optimizer)
    assert runs[0].keys() != runs[1].keys() or any(
        runs[0][k].shape != runs[1][k].shape or not torch.equal(runs[0][k], runs[1][k])
        for k in runs[0]
    )


@pytest.mark.parametrize("when", ["before backward", "before step"])
def test_a_new_structure_starts_from_the_identity(when: str) -> None:
    model, optimizer = started()
    train(model, optimizer, batches(2))
    optimizer.zero_grad()
    if when == "before step":
        backward(model)
    optimizer.param_groups[0]["structures"] = ("diagonal", "diagonal")
    optimizer.param_groups[0]["momentum"] = 0.0
    fresh = copy.deepcopy(model)
    other = SINGD(fresh, T=1, lr=0.05, structures=("diagonal", "diagonal"), momentum=0.0)
    if when == "before backward":
        backward(model)
        backward(fresh)
    else:  # what was seen had the old structure, and is dropped
        for p, q in zip(fresh.parameters(), model.parameters(), strict=True):
            p.grad = q.grad.clone()
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gradients that no pass brought
        other.step()
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p, q)
    ones = torch.ones(5, dtype=F64)
    for m, o in ((model, optimizer), (fresh, other)):
        assert torch.equal(factors(o, m[0].weight)["K"], ones) == (when == "before step")


def test_groups_with_their_own_period_update_at_their_own_steps() -> None:
    model = mlp()
    groups = [{"params": model[0].parameters(), "T": 2}, {"params": model[2].parameters(), "T": 3}]
    optimizer = SINGD(model, groups, lr=0.0)
    updates: list[list[int]] = [[], []]
    for step, batch in enumerate(batches(7)):
        before = [factors(optimizer, m.weight) for m in (model[0], model[2])] if step else None
        kept = [b["K"].clone() if b else I5 for b in before] if before else [I5, torch.eye(7)]
        train(model, optimizer, [batch])
        for steps, m, K in zip(updates, (model[0], model[2]), kept, strict=True):
            if not torch.equal(factors(optimizer, m.weight)["K"], K.double()):
                steps.append(step)
    assert updates == [[0, 2, 4, 6], [0, 3, 6]]


# Several optimizers, none, copies -----------------------------------------------------------------


def test_two_optimizers_on_one_model_do_not_disturb_each_other() -> None:
    model, alone = mlp(), mlp()
    optimizer, other = SINGD(model, T=1, lr=0.05), KFAC(model, T=1, lr=0.0)
    expected = SINGD(alone, T=1, lr=0.05)
    for X, y in batches(3):
        for m in (model, alone):
            m.zero_grad()
            mean_loss(m(X), y).backward()
        other.step()
        optimizer.step()
        expected.step()
    assert distance(snapshot(model, optimizer), snapshot(alone, expected)) == 0.0
    assert not torch.equal(factors(other, model[0].weight)["S_K"], I5)


@pytest.mark.parametrize("how", ["close", "with", "drop"])
def test_an_optimizer_that_is_closed_or_dropped_leaves_the_model_as_it_was(how: str) -> None:
    model = mlp()
    kept = SINGD(model, T=1)
    optimizer = SINGD(model, T=1)
    for each in (kept, optimizer):
        train(model, each, batches(1))
    del each
    if how == "with":
        with optimizer:
            pass
    elif how == "close":
        optimizer.close()
        optimizer.close()
    else:
        gone = weakref.ref(optimizer)
        del optimizer
        gc.collect()
        assert gone() is None
    assert [len(m._forward_hooks) for m in model] == [1, 0, 1]
    kept.close()
    assert [len(m._forward_hooks) for m in model] == [0, 0, 0]
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_an_optimizer_dropped_with_the_graph_alive_does_no_harm() -> None:
    model = mlp()
    optimizer = SINGD(model, T=1)
    X, y = batches(1)[0]
    loss = mean_loss(model(X), y)
    del optimizer
    loss.backward()
    got = [p.grad for p in model.parameters()]
    bare = mlp()
    backward(bare)
    assert all(torch.equal(g, p.grad) for g, p in zip(got, bare.parameters(), strict=True))


def by_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("how", [copy.deepcopy, by_pickle])
@pytest.mark.parametrize("method", METHODS)
def test_a_copy_of_model_and_optimizer_goes_on_like_the_original(how: Any, method: str) -> None:
    model = nn.Sequential(*mlp(), nn.LayerNorm(3, dtype=F64))
    optimizer = METHODS[method](model, T=2, lr=0.05)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)  # it wraps ``step``
    train(model, optimizer, batches(3))
    model_copy, other = how((model, optimizer))
    assert other.model is model_copy
    before = snapshot(model, optimizer)
    copied = train(model_copy, other, batches(4))
    assert distance(snapshot(model, optimizer), before) == 0.0
    assert distance(train(model, optimizer, batches(4)), copied) == 0.0


class Agent(nn.Module):
    """A model that holds its optimizer, which holds the model, or a part of it."""

    def __init__(self, part: bool) -> None:
        super().__init__()
        self.net = mlp()
        self.optimizer = SINGD(self.net if part else self, T=1, lr=0.05)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("how", [copy.deepcopy, by_pickle])
def test_a_copy_of_a_model_that_holds_its_optimizer_goes_on(how: Any, part: bool) -> None:
    agent = Agent(part)
    train(agent, agent.optimizer, batches(3))
    other = how(agent)
    assert other.optimizer.model is (other.net if part else other)
    assert "__setstate__" not in vars(other)
    got = train(other, other.optimizer, batches(4))
    assert distance(got, train(agent, agent.optimizer, batches(4))) == 0.0


@pytest.mark.parametrize("how", [copy.deepcopy, by_pickle])
def test_a_copy_of_the_model_alone_is_not_captured(how: Any) -> None:
    model, optimizer = started()
    teacher = how(model)
    X, y = batches(1)[0]
    bare, expected = started()
    mean_loss(bare(X), y).backward()
    expected.step()
    (mean_loss(model(X), y) + mean_loss(teacher(3 * X), y)).backward()
    optimizer.step()
    assert distance(snapshot(model, optimizer), snapshot(bare, expected)) == 0.0


# A step happens whole or not at all ---------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", ["0.weight", "0.bias", "2.weight", "3.weight"])
def test_one_bad_gradient_stops_the_whole_step(method: str, where: str) -> None:
    model = nn.Sequential(*mlp(), nn.LayerNorm(3, dtype=F64))
    optimizer = METHODS[method](model, T=1)
    train(model, optimizer, batches(2))
    before = snapshot(model, optimizer)
    steps = [group.get("step") for group in optimizer.param_groups]
    optimizer.zero_grad()
    backward(model)
    model.get_parameter(where).grad.view(-1)[-1] = float("inf")
    optimizer.step()
    assert distance(snapshot(model, optimizer), before) == 0.0
    assert [group["step"] for group in optimizer.param_groups] == [step + 1 for step in steps]
    assert optimizer.skipped == 1
