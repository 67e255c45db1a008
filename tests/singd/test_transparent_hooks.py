"""A watched model does what it does without an optimizer, and nothing of that is captured."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, func, nn
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad, functional, graph
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from singd import SINGD
from tests.singd.runs import F64, batches, distance, mean_loss, mlp, snapshot, train

X = batches(1, seed=3)[0][0]


def gradients(model: nn.Module, run: Callable[[], Tensor]) -> list[Any]:
    """Of a backward pass, as copies; the model is left without."""
    run().square().sum().backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    return found


# Not captured -------------------------------------------------------------------------------------


def per_sample(m: nn.Module) -> Any:
    def loss(parameters: Any, x: Tensor) -> Tensor:
        return func.functional_call(m, parameters, (x,)).square().sum()

    return func.vmap(func.grad(loss), (None, 0))(dict(m.named_parameters()), X)


def ensemble(m: nn.Module) -> Any:
    parameters, buffers = func.stack_module_state([m, copy.deepcopy(m)])
    base = copy.deepcopy(m)
    return func.vmap(lambda p, b: func.functional_call(base, (p, b), (X,)))(parameters, buffers)


def tangent(m: nn.Module) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(m(forward_ad.make_dual(X, X))).tangent


def stacked_gradients(m: nn.Module) -> Any:
    stack = torch.eye(3, dtype=F64)
    return torch.autograd.grad(m(X).sum(0), list(m.parameters()), stack, is_grads_batched=True)


def traced_gradients(m: nn.Module) -> Any:
    def of(x: Tensor) -> Any:
        return torch.autograd.grad(m(x).square().sum(), list(m.parameters()))

    return make_fx(of)(X)(X)


def saved_whole(m: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(m, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert not any(module._forward_hooks for module in other.modules())
    return gradients(other, lambda: other(X))


def quantized(m: nn.Module) -> Any:
    """Modules that replace others take over their hooks."""
    other = torch.ao.quantization.quantize_dynamic(copy.deepcopy(m).float(), {nn.Linear})
    return other(X.float())


def traced(m: nn.Module) -> Any:
    with torch.no_grad():
        return torch.jit.trace(m, X)(X)


NOT_CAPTURED: dict[str, Callable[[nn.Module], Any]] = {
    "func.vjp": lambda m: func.vjp(m, X)[1](torch.ones(8, 3, dtype=F64)),
    "func.jvp": lambda m: func.jvp(m, (X,), (X,)),
    "func.hessian": lambda m: func.hessian(lambda x: m(x).sum())(X[0]),
    "gradients sample by sample": per_sample,
    "an ensemble": ensemble,
    "vmap": lambda m: func.vmap(m)(X),
    "forward mode": tangent,
    "a vectorized jacobian": lambda m: functional.jacobian(m, X, vectorize=True),
    "a hessian times a vector": lambda m: functional.hvp(lambda x: m(x).sum(), X, X),
    "a stack of gradients": stacked_gradients,
    "a traced gradient": traced_gradients,
    "fx": lambda m: torch.fx.symbolic_trace(m)(X),
    "export": lambda m: torch.export.export(m, (X,)).module()(X),
    "jit.trace": traced,
    "a saved model": saved_whole,
    "a shallow copy": lambda m: copy.copy(m)(X),
    "a quantized copy": quantized,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize")
@pytest.mark.parametrize("name", NOT_CAPTURED)
def test_what_is_no_training_is_as_without_and_not_captured(name: str) -> None:
    bare, model = mlp(), mlp()
    alone, optimizer = (SINGD(m, T=1, lr=0.05) for m in (bare, model))
    for m, o in ((bare, alone), (model, optimizer)):
        train(m, o, batches(2))
    got, expected = (NOT_CAPTURED[name](m) for m in (model, copy.deepcopy(bare)))
    for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        assert torch.equal(a, b)
    for m, o in ((bare, alone), (model, optimizer)):
        train(m, o, batches(4)[2:])
    assert distance(snapshot(model, optimizer), snapshot(bare, alone)) == 0.0


# Captured as any pass -----------------------------------------------------------------------------


def in_compiled_autograd(m: nn.Module) -> Tensor:
    with compiled_autograd._enable(torch.compile(backend="eager")):
        loss: Tensor = m(X).square().sum() / len(X)
        loss.backward()
    return loss


def kept_on_host(m: nn.Module) -> Tensor:
    with graph.save_on_cpu():
        return m(X)


def selective(m: nn.Module) -> Any:
    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = operator == torch.ops.aten.addmm.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(m, X, use_reentrant=False, context_fn=contexts)


def other_hooks(m: Any) -> Tensor:
    for module in m:
        module.register_full_backward_hook(lambda *args: None)
        module.register_full_backward_pre_hook(lambda module, grads: grads)
    y: Tensor = m(X.clone().requires_grad_())
    return y


def with_several_gradients(m: Any) -> Tensor:
    first = m[:2](X)
    first.retain_grad()
    last: Tensor = m[2](first)
    graph.register_multi_grad_hook((first, last), lambda grads: None)
    return last


CAPTURED: dict[str, Callable[[nn.Module], Any]] = {
    "kept on the host": kept_on_host,
    "checkpoints": lambda m: checkpoint_sequential(m, 2, X, use_reentrant=False),
    "selective checkpoints": selective,
    "other hooks": other_hooks,
    "several gradients": with_several_gradients,
}


@pytest.mark.parametrize("name", CAPTURED)
def test_other_ways_to_run_a_pass_train_alike(name: str) -> None:
    runs = []
    for run in (CAPTURED[name], lambda m: m(X)):
        model = mlp()
        optimizer = SINGD(model, T=1, lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            mean_loss(run(model), torch.zeros(8, 3, dtype=F64)).backward()
            optimizer.step()
        runs.append(snapshot(model, optimizer))
    assert distance(*runs) < 1e-12


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch asks for it, to copy tensors
def test_compiled_autograd() -> None:
    """Of one layer: compiling its hooks takes seconds."""
    runs = []
    for compiled in (True, False):
        model = mlp()[:1]
        optimizer = SINGD(model, T=1, lr=0.05)
        for _ in range(2):
            optimizer.zero_grad()
            if compiled:
                in_compiled_autograd(model)
            else:
                (model(X).square().sum() / len(X)).backward()
            optimizer.step()
        runs.append(snapshot(model, optimizer))
    assert distance(*runs) < 1e-12


def test_passes_in_several_threads_raise_nothing_and_hand_nothing_over() -> None:
    model = mlp()
    optimizer = SINGD(model, T=1, lr=0.05)
    faults: list[Any] = []

    def run(scale: int) -> None:
        try:
            for _ in range(20):
                loss = model(scale * X).square().sum()
                torch.autograd.grad(loss, list(model.parameters()))
        except Exception as fault:
            faults.append(fault)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not faults
    assert not any(thread.is_alive() for thread in threads)
    train(model, optimizer, batches(2))
    assert not any(group["handed_over"] for group in optimizer.param_groups)


def test_a_pass_within_a_pass() -> None:
    model = mlp()
    optimizer = SINGD(model, T=1, lr=0.05)
    y = model(X)
    inner: list[Any] = []

    def again(grad: Tensor) -> None:
        with torch.enable_grad():
            loss = model(2 * X).square().sum()
        inner.append(torch.autograd.grad(loss, list(model.parameters())))

    y.register_hook(again)
    y.square().sum().backward()
    optimizer.step()
    assert len(inner) == 1
    assert not any(group["handed_over"] for group in optimizer.param_groups)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("trace", "advice"),
    [
        (torch.jit.script, r"script .* watched .*: call optimizer\.close\(\) first"),
        (
            lambda m: torch.compile(m, backend="eager", fullgraph=True)(X),
            r"gradients: use torch\.no_grad\(\), or optimizer\.close\(\) first",
        ),
    ],
    ids=["script", "fullgraph"],
)
def test_what_cannot_be_traced_says_what_to_do(trace: Any, advice: str) -> None:
    """Without gradients a model is traced as it is, but not scripted."""
    model = mlp()
    optimizer = SINGD(model, T=1)
    with pytest.raises(Exception, match=advice):
        trace(model)
    optimizer.close()
    trace(model)
