"""Capture sees every pass that trains, once, and nothing else; it keeps nothing alive."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from tests.singd.dense import relative
from tests.singd.paper import KFAC, SINGD
from tests.singd.runs import F64, Snapshot, batches, distance, factors, mean_loss, mlp, snapshot

Backward = Callable[[nn.Module, Tensor, Tensor], None]


def plain(model: nn.Module, X: Tensor, y: Tensor) -> None:
    mean_loss(model(X), y).backward()


def run(backward: Backward, model: nn.Module | None = None, **options: Any) -> Snapshot:
    """Three steps whose backward passes are done by ``backward``."""
    model = mlp() if model is None else model
    optimizer = SINGD(model, **{"T": 1, "lr": 0.05} | options)
    for X, y in batches(3):
        optimizer.zero_grad()
        backward(model, X, y)
        optimizer.step()
    return snapshot(model, optimizer)


# What leaves no trace ----------------------------------------------------------------------------


def evaluate(model: nn.Module, X: Tensor, y: Tensor) -> None:
    model.eval()
    with torch.no_grad():
        model(3 * X)
    with torch.inference_mode():
        model(4 * X)
    model.train()


def unused_forward(model: nn.Module, X: Tensor, y: Tensor) -> None:
    model(2 * X).sum()


def input_gradient(model: nn.Module, X: Tensor, y: Tensor) -> None:
    x = X.clone().requires_grad_()
    torch.autograd.grad(mean_loss(model(x), y), x)


def parameter_gradient(model: nn.Module, X: Tensor, y: Tensor) -> None:
    torch.autograd.grad(mean_loss(model(5 * X), y), list(model.parameters()))


def adversarial_input(model: nn.Module, X: Tensor, y: Tensor) -> None:
    x = X.clone().requires_grad_()
    mean_loss(model(x), y).backward(inputs=[x])


def per_sample_gradients(model: nn.Module, X: Tensor, y: Tensor) -> None:
    weights = {k: p.detach() for k, p in model.named_parameters()}

    def one(w: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, w, (x,)).sum()

    vmap(grad(one), in_dims=(None, 0))(weights, X)
    functional_call(
        model, {k: w.requires_grad_() for k, w in weights.items()}, (X,)
    ).sum().backward()


def second_order(model: nn.Module, X: Tensor, y: Tensor) -> None:
    x = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(mean_loss(model(x), y), x, create_graph=True)
    torch.autograd.grad(g.square().sum(), x)


@pytest.mark.parametrize(
    "other",
    [
        evaluate,
        unused_forward,
        input_gradient,
        parameter_gradient,
        adversarial_input,
        per_sample_gradients,
        second_order,
    ],
)
@pytest.mark.parametrize("where", ["before", "between", "after"])
def test_passes_for_another_purpose_leave_no_trace(other: Backward, where: str) -> None:
    def backward(model: nn.Module, X: Tensor, y: Tensor) -> None:
        if where == "before":
            other(model, X, y)
        loss = mean_loss(model(X), y)
        if where == "between":
            other(model, X, y)
        loss.backward()
        if where == "after":
            other(model, X, y)

    assert distance(run(backward), run(plain)) == 0.0


def test_a_failed_pass_leaves_no_trace_after_zero_grad() -> None:
    def backward(model: nn.Module, X: Tensor, y: Tensor) -> None:
        plain(model, 7 * X, y)
        optimizer.zero_grad()
        plain(model, X, y)

    model = mlp()
    optimizer = SINGD(model, T=1, lr=0.05)
    for X, y in batches(3):
        backward(model, X, y)
        optimizer.step()
        optimizer.zero_grad()
    assert distance(snapshot(model, optimizer), run(plain)) == 0.0


def test_nothing_is_seen_in_a_pause_or_after_closing() -> None:
    model = mlp()
    with SINGD(model, T=1, lr=0.0) as optimizer:
        with optimizer.paused():
            plain(model, *batches(1)[0])
        optimizer.step()
        K = factors(optimizer, model[0].weight)["K"]
        assert torch.equal(K, torch.eye(5, dtype=F64))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_paused_pass_does_not_bring_in_what_another_saw() -> None:
    model = mlp()
    optimizer = SINGD(model, T=1, lr=0.0)
    parameter_gradient(model, *batches(1)[0])
    with optimizer.paused():
        plain(model, *batches(1)[0])
    optimizer.step()
    assert torch.equal(factors(optimizer, model[0].weight)["K"], torch.eye(5, dtype=F64))


@pytest.mark.parametrize("later", [False, True])
def test_a_pause_counts_when_the_model_is_called_not_when_it_is_recomputed(later: bool) -> None:
    model = mlp()
    optimizer = SINGD(model, T=1, lr=0.0)
    X, y = batches(1)[0]
    with nullcontext() if later else optimizer.paused():
        loss = mean_loss(checkpoint(model, X.requires_grad_(), use_reentrant=False), y)
    with optimizer.paused() if later else nullcontext():
        loss.backward()
    optimizer.step()
    is_new = torch.equal(factors(optimizer, model[0].weight)["K"], torch.eye(5, dtype=F64))
    assert is_new != later


@pytest.mark.parametrize("given", [SINGD, KFAC])
def test_gradients_that_no_pass_brought_are_told_of_once(given: Any) -> None:
    model = mlp()
    optimizer = given(model, T=2, lr=0.05)
    with warnings.catch_warnings(record=True, action="always") as caught:
        for X, y in batches(6):
            loss = mean_loss(model(X), y)
            parameters = list(model.parameters())
            for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p.grad = g
            optimizer.step()
    (warning,) = caught
    assert str(warning.message).startswith("0.weight, 2.weight: no backward pass was seen")
    assert optimizer.param_groups[0]["handed_over"] == ()


class Added(nn.Module):
    """``x += layer(x)``, for layers whose products are of a copy of ``x``."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        circular = nn.Conv1d(5, 5, 3, padding=1, padding_mode="circular")
        self.layer = circular if kind == "padded" else nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = (x * 1.0).mT if self.kind == "strided" else x * 1.0
        x += self.layer(x)
        return self.head(x).float()


@pytest.mark.parametrize("kind", ["padded", "strided", "cast"])
def test_an_input_that_is_changed_in_place_is_an_error_only_where_it_is_one(kind: str) -> None:
    torch.manual_seed(0)
    model, X = Added(kind), torch.randn(4, 5, 5)
    bare = copy.deepcopy(model)
    optimizer = SINGD(model, T=1)
    for net in (model, bare):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "cast"):
            loss = net(X).square().mean()
        loss.backward()
    for p, q in zip(model.parameters(), bare.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    with pytest.warns(UserWarning, match=r"layer\.weight: its input is changed in place"):
        optimizer.step()
    assert "K" in optimizer.state[model.head.weight]
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    with SINGD(model, T=1):
        x = torch.randn(3, 4) * 1.0
        y = model(x)
        x += 1.0
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_data_of_steps_between_updates_does_not_matter() -> None:
    seen = []
    for scale in (1.0, 100.0):
        model = mlp()
        optimizer = SINGD(model, T=3, lr=0.0, alpha1=0.5, kl_clip=None)
        for step, (X, y) in enumerate(batches(7)):
            optimizer.zero_grad()
            plain(model, X if step % 3 == 0 else scale * X, y)
            optimizer.step()
        seen.append(factors(optimizer, model[0].weight))
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in ("K", "C", "m_K", "m_C"))
    assert not torch.equal(seen[0]["K"], torch.eye(5, dtype=F64))


# What is the same pass in other words ------------------------------------------------------------


def same_as(expected: Backward, backward: Backward, tolerance: float = 0.0) -> None:
    assert distance(run(backward), run(expected)) <= tolerance


def test_in_place_activations() -> None:
    def net(inplace: bool) -> nn.Sequential:
        model = mlp()
        model[1] = nn.ReLU(inplace=inplace)
        return model

    assert distance(run(plain, net(True)), run(plain, net(False))) == 0.0


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_activation_checkpointing(reentrant: bool, whole: bool) -> None:
    def backward(model: Any, X: Tensor, y: Tensor) -> None:
        x = X.clone().requires_grad_()
        if whole:
            output = checkpoint(model, x, use_reentrant=reentrant)
        else:
            output = model[2](checkpoint(model[:2], x, use_reentrant=reentrant))
        mean_loss(output, y).backward()

    same_as(plain, backward)


def test_a_functional_call_with_the_own_weights() -> None:
    def backward(model: nn.Module, X: Tensor, y: Tensor) -> None:
        mean_loss(functional_call(model, dict(model.named_parameters()), (X,)), y).backward()

    same_as(plain, backward)


def test_keyword_arguments() -> None:
    def backward(model: Any, X: Tensor, y: Tensor) -> None:
        hidden = model[1](model[0](input=X))
        mean_loss(model[2](input=hidden), y).backward()

    same_as(plain, backward)


def test_a_closure() -> None:
    model = mlp()
    optimizer = SINGD(model, T=1, lr=0.05)
    for X, y in batches(3):

        def closure(X: Tensor = X, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = mean_loss(model(X), y)
            loss.backward()
            return loss

        with torch.no_grad():
            before = mean_loss(model(X), y)
        assert torch.equal(optimizer.step(closure), before)
    assert distance(snapshot(model, optimizer), run(plain)) == 0.0


def test_backward_twice_is_two_micro_batches() -> None:
    def twice(model: nn.Module, X: Tensor, y: Tensor) -> None:
        loss = mean_loss(model(X), y)
        loss.backward(retain_graph=True)
        loss.backward()

    def again(model: nn.Module, X: Tensor, y: Tensor) -> None:
        plain(model, X, y)
        plain(model, X, y)

    same_as(again, twice)


def test_a_penalty_of_weight_zero() -> None:
    def backward(model: nn.Module, X: Tensor, y: Tensor) -> None:
        x = X.clone().requires_grad_()
        loss = mean_loss(model(x), y)
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + 0.0 * g.square().sum()).backward()

    same_as(plain, backward, 1e-14)


def test_a_gradient_penalty_has_the_gradient_autograd_gives_it() -> None:
    def penalized(model: nn.Module, X: Tensor, y: Tensor) -> list[Tensor]:
        x = X.clone().requires_grad_()
        loss = mean_loss(model(x), y)
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + 1e-3 * g.square().sum()).backward()
        return [p.grad for p in model.parameters()]

    model, bare = mlp(), mlp()
    optimizer = SINGD(model, T=1)
    (X, y), *_ = batches(1)
    for got, expected in zip(penalized(model, X, y), penalized(bare, X, y), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-15)
    optimizer.step()


class Shared(nn.Module):
    """One layer, used in up to three segments, each checkpointed or not."""

    def __init__(self, checkpointed: str, nested: bool = False) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4, dtype=F64), nn.Linear(4, 3, dtype=F64)
        self.checkpointed, self.nested = checkpointed, nested

    def segment(self, x: Tensor, mode: str) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return self.layer(x).tanh()

        def twice(x: Tensor) -> Tensor:
            return run(checkpoint(run, x, use_reentrant=True))

        function = twice if self.nested else run
        if mode == "-":
            return run(run(x)) if self.nested else run(x)
        return checkpoint(function, x, use_reentrant=mode == "r")

    def forward(self, x: Tensor) -> Tensor:
        for mode in self.checkpointed:
            x = self.segment(x, mode)
        return self.head(x)


@pytest.mark.parametrize("checkpointed", ["rr", "r-r", "-rr", "rr-", "nn", "n-", "rn"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_weight_in_several_checkpointed_segments_is_one_layer_used_as_often(
    checkpointed: str, nested: bool
) -> None:
    """Reentrant segments run passes within the pass: their samples are counted once."""

    def backward(model: nn.Module, X: Tensor, y: Tensor) -> None:
        for x, t in ((X[:3], y[:3]), (X[3:], y[3:])):  # two micro-batches are two
            loss = 0.5 * (model(x.clone().requires_grad_()) - t).square().sum() / len(X)
            loss.backward()

    torch.manual_seed(0)
    plain = Shared("-" * len(checkpointed), nested)
    model = Shared(checkpointed, nested)
    model.load_state_dict(plain.state_dict())
    assert distance(run(backward, model), run(backward, plain)) < 1e-12


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_frees_what_it_frees(reentrant: bool) -> None:
    model, kept = mlp(), []
    optimizer = SINGD(model, T=1)
    model[2].register_forward_pre_hook(
        lambda _, args: kept.append(StorageWeakRef(args[0].untyped_storage()))
    )
    (X, y), *_ = batches(1)
    output = checkpoint(model, X.requires_grad_(), use_reentrant=reentrant)
    assert len(kept) == 1
    assert kept[0].expired()  # the input of the last layer, computed anew in the backward pass
    mean_loss(output, y).backward()
    assert len(kept) == 2
    assert kept[1].expired()
    optimizer.step()


# Weights used more than once ---------------------------------------------------------------------


class Twice(nn.Module):
    """One layer, used twice in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, bias=False, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


def test_a_layer_used_twice_has_the_rows_of_both_uses() -> None:
    model = Twice()
    X, y = torch.randn(5, 3, dtype=F64), torch.randn(5, 3, dtype=F64)
    optimizer = KFAC(model, T=1, lr_cov=1.0, damping=1.0)
    W = model.layer.weight.detach().clone()
    z1 = X @ W.T
    z2 = z1.tanh() @ W.T
    g2 = (z2 - y) / 5
    g1 = g2 @ W * (1 - z1.tanh() ** 2)
    mean_loss(model(X), y).backward()
    optimizer.step()
    state = optimizer.state[model.layer.weight]
    A, B = torch.cat([X, z1.tanh()]), torch.cat([g1, g2])
    assert relative(state["S_K"][0], A.T @ A / 10) < 1e-13
    assert relative(state["S_C"][0], 5 * B.T @ B) < 1e-13


def test_two_modules_that_share_a_weight_are_one_layer_used_twice() -> None:
    class Tied(Twice):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(3, 3, bias=False, dtype=F64)
            self.other.weight = self.layer.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.layer(x).tanh())

    tied, twice = Tied(), Twice()
    twice.load_state_dict({"layer.weight": tied.layer.weight})
    X, y = torch.randn(5, 3, dtype=F64), torch.randn(5, 3, dtype=F64)
    seen = []
    for model in (tied, twice):
        optimizer = SINGD(model, T=1)
        mean_loss(model(X), y).backward()
        optimizer.step()
        seen.append(snapshot(model, optimizer))
    assert distance(*seen) == 0.0


def test_convolutions_that_share_a_weight_keep_their_own_geometry() -> None:
    """Every use is read with the stride, padding and dilation of the module that made it."""

    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.near = nn.Conv1d(2, 3, 3, bias=False, dtype=F64)
            self.far = nn.Conv1d(2, 3, 3, stride=2, dilation=2, padding=1, bias=False, dtype=F64)
            self.far.weight = self.near.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.near(x).square().sum((1, 2)) + self.far(x).square().sum((1, 2))

    model, X = Scales(), torch.randn(4, 2, 9, dtype=F64)
    optimizer = KFAC(model, T=1, lr_cov=1.0, damping=1.0, loss_average=None)
    model(X).sum().backward()
    patches = [X.unfold(2, 3, 1)]
    padded = nn.functional.pad(X, (1, 1))
    patches.append(padded.unfold(2, 5, 2)[..., ::2])
    A = torch.cat([p.movedim(1, 2).flatten(0, 1).flatten(1) for p in patches])
    B = 2 * A @ model.near.weight.detach().flatten(1).T
    optimizer.step()
    state = optimizer.state[model.near.weight]
    assert relative(state["S_K"][0], A.T @ A / len(A)) < 1e-13
    assert relative(state["S_C"][0], B.T @ B) < 1e-13


def test_a_weight_that_is_also_used_in_another_way_is_left_to_adamw() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4, dtype=F64)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).tanh() + 3 * x.square() @ self.layer.weight.T

    model, bare = Tied(), Tied()
    bare.load_state_dict(model.state_dict())
    optimizer, adamw = (
        SINGD(model, T=1),
        torch.optim.AdamW(bare.parameters(), lr=0.03 * 0.1, weight_decay=0.0),
    )

    def step(X: Tensor) -> None:
        for net, method in ((model, optimizer), (bare, adamw)):
            method.zero_grad()
            net(X).square().sum().backward()
            method.step()

    first, *rest = torch.randn(3, 5, 4, dtype=F64)
    with pytest.warns(UserWarning, match=r"layer.weight: .* AdamW trains it"):
        step(first)
    for X in rest:
        step(X)
    assert torch.equal(model.layer.weight, bare.layer.weight)
    assert torch.equal(model.layer.bias, bare.layer.bias)


# Memory ------------------------------------------------------------------------------------------


def hidden_storage(model: nn.Sequential, X: Tensor) -> tuple[Tensor, StorageWeakRef]:
    """The model's output, and a weak reference to the input of its last layer."""
    hidden = model[1](model[0](X))
    return model[2](hidden), StorageWeakRef(hidden.untyped_storage())


def test_inputs_are_freed_by_the_backward_pass() -> None:
    model = mlp()
    optimizer = SINGD(model, T=1)
    output, hidden = hidden_storage(model, batches(1)[0][0])
    loss = output.sum()
    assert not hidden.expired()
    loss.backward()
    assert hidden.expired()  # output, loss and optimizer still live
    optimizer.step()


def test_inputs_are_freed_with_a_graph_that_is_dropped() -> None:
    model = mlp()
    optimizer = SINGD(model, T=1)
    output, hidden = hidden_storage(model, batches(1)[0][0])
    del output
    assert hidden.expired()
    assert optimizer.param_groups


def test_the_forward_pass_saves_the_same_memory_as_without() -> None:
    """Every tensor that the capture saves for backward is one that autograd saves anyway."""
    (X, _), *_ = batches(1)

    def saved(model: nn.Module) -> int:
        storages = {}

        def pack(t: Tensor) -> Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            output = model(X)
        assert output.requires_grad
        return sum(storage.nbytes() for storage in storages.values())

    bare = mlp()
    hooked = copy.deepcopy(bare)
    optimizer = SINGD(hooked, T=1)
    assert saved(hooked) == saved(bare)
    optimizer.close()


def test_statistics_are_not_kept_past_the_step() -> None:
    model = mlp()
    optimizer = SINGD(model, T=1)
    plain(model, *batches(1)[0])
    optimizer.step()
    assert not any(
        a.total or a._pending or a._counted for a in optimizer._parts.capture.accumulators.values()
    )
