"""accelerate wraps the optimizer, and skips its calls while gradients are accumulated."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from torch import nn

from tests.frameworks.data import by_hand, classifier, digits, loader
from tests.singd.paper import SINGD
from tests.singd.runs import Snapshot, distance, snapshot


def made(net: nn.Module) -> SINGD:
    return SINGD(net, lr=0.05, T=2, kl_clip=1e-2, structures=("dense", "diagonal"))


def halving(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


def prepared(accelerator: Accelerator) -> tuple[Any, Any, Any, Any]:
    net = classifier()
    optimizer = made(net)
    return accelerator.prepare(net, optimizer, loader(8), halving(optimizer))


def train(accelerator: Accelerator, parts: tuple[Any, ...]) -> Snapshot:
    """The loop of accelerate's documentation."""
    model, optimizer, data, scheduler = parts
    for X, y in data:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(X), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return snapshot(accelerator.unwrap_model(model), optimizer.optimizer)


@pytest.mark.parametrize("micro", [1, 2])
def test_prepared_training_is_the_loop(micro: int) -> None:
    net = classifier()
    optimizer = made(net)
    scheduler = halving(optimizer)
    expected = by_hand(net, optimizer, list(loader(8)), micro=micro, clip=0.3, scheduler=scheduler)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=micro)
    assert distance(train(accelerator, prepared(accelerator)), expected) == 0.0


def test_bfloat16() -> None:
    net = classifier()
    optimizer = made(net)
    for X, y in loader(8):
        with torch.autocast("cpu", torch.bfloat16):
            output = net(X)
        nn.functional.cross_entropy(output.float(), y).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model, wrapped, data, _ = prepared(accelerator)
    got = train(
        accelerator,
        (
            model,
            wrapped,
            data,
            torch.optim.lr_scheduler.LambdaLR(wrapped.optimizer, lambda step: 1.0),
        ),
    )
    assert distance(got, snapshot(net, optimizer)) == 0.0


def test_the_state_resumes_bit_for_bit(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    parts = prepared(accelerator)
    train(accelerator, parts)
    accelerator.save_state(str(tmp_path))
    whole = train(accelerator, parts)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    parts = prepared(accelerator)
    accelerator.load_state(str(tmp_path))
    assert distance(train(accelerator, parts), whole) == 0.0


def test_a_closure_is_evaluated_once() -> None:
    accelerator = Accelerator(cpu=True)
    model, optimizer, data, _ = prepared(accelerator)
    calls = []

    def closure(X: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X), y)
        accelerator.backward(loss)
        calls.append(loss)
        return loss

    for batch in data:
        optimizer.step(partial(closure, *batch))
    net = classifier()
    expected = by_hand(net, made(net), list(loader(8)))
    assert len(calls) == 8
    assert distance(snapshot(model, optimizer.optimizer), expected) == 0.0


def test_an_overflow_is_a_skipped_step() -> None:
    Accelerator(cpu=True)
    net = classifier()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimizer = AcceleratedOptimizer(made(net), scaler=scaler)
    X, y = digits()
    skipped = []
    for bad in (False, True, False):
        loss = nn.functional.cross_entropy(net(X[:16]), y[:16])
        scaler.scale(loss * float("inf") if bad else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        skipped.append(optimizer.step_was_skipped)
    assert skipped == [False, True, False]
    assert optimizer.optimizer.param_groups[0]["step"] == 2
