"""A small problem, and the loop that everybody writes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Make = Callable[..., Optimizer]
"""``make(model, params=None, **options)``: an optimizer class, or a function that is called so."""

Model = TypeVar("Model", bound=nn.Module)

Batch = tuple[Tensor, Tensor]


def net(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """Two linear layers and a normalization; always the same weights."""
    with torch.random.fork_rng(devices=[]):
        layers = nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)
    return initialized(nn.Sequential(*layers), seed).to(dtype)


def initialized(model: Model, seed: int = 0) -> Model:
    """``model`` with random numbers in its layers, always the same."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            for p in module.parameters(recurse=False):
                numbers = torch.rand(p.shape, generator=generator, dtype=torch.float64)
                p.data = (2 * numbers - 1).div(module.in_features**0.5).to(p.dtype)
    return model


@functools.lru_cache
def batches(count: int, dtype: torch.dtype = torch.float64) -> Sequence[Batch]:
    """Inputs ``[16, 4]`` and what another net makes of them."""
    generator = torch.Generator().manual_seed(1)
    teacher, found = net(seed=7), []
    for _ in range(count):
        X = torch.randn(16, 4, generator=generator, dtype=torch.float64)
        found.append((X.to(dtype), teacher(X).detach().to(dtype)))
    return tuple(found)


def backward(model: nn.Module, batch: Batch) -> Tensor:
    """The squared error of a batch, a mean over samples, and its gradients."""
    X, y = batch
    loss = (model(X) - y).square().sum() / len(y)
    loss.backward()
    return loss.detach()


def train(
    model: nn.Module, optimizer: Optimizer, data: Iterable[Batch], schedulers: Sequence[Any] = ()
) -> list[float]:
    """One step for each batch; the losses."""
    losses = []
    for batch in data:
        optimizer.zero_grad()
        losses.append(float(backward(model, batch)))
        optimizer.step()
        for scheduler in schedulers:
            is_plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*([losses[-1]] if is_plateau else []))
    return losses


def weights(model: nn.Module) -> list[Tensor]:
    """Copies of all parameters."""
    return [p.detach().clone() for p in model.parameters()]


def moved(model: nn.Module) -> list[bool]:
    """Which parameters of a :func:`net` are no longer as they were made."""
    return [not torch.equal(a, b) for a, b in zip(weights(model), weights(net()), strict=True)]


def trained(
    make: Make, count: int = 3, params: Callable[[nn.Sequential], Any] = lambda model: None
) -> tuple[nn.Sequential, Optimizer]:
    """A model and its optimizer, which is given some ``params`` of it, after some steps."""
    model = net()
    optimizer = make(model, params(model))
    train(model, optimizer, batches(count))
    return model, optimizer


def assert_same(got: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    """All tensors are the same to the bit."""
    equal = [torch.equal(a, b) for a, b in zip(got, expected, strict=True)]
    assert all(equal), f"{what}: {equal.count(False)} of {len(equal)} tensors differ"


def assert_near(got: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    """All tensors are the same but for rounding."""
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9, msg=lambda text: f"{what}: {text}")


def assert_falls(losses: Sequence[float], what: str) -> None:
    """The loss of the last five steps is below that of the first five."""
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    assert last < 0.95 * first, f"{what}: the loss went from {first:.4g} to {last:.4g}"


@contextmanager
def assert_raises(errors: tuple[type[Exception], ...], what: str) -> Iterator[None]:
    """One of ``errors`` is raised within this context."""
    names = " or ".join(error.__name__ for error in errors)
    try:
        yield
    except errors:
        return
    except Exception as error:
        raise AssertionError(
            f"{what}: expected {names}, got {type(error).__name__}: {error}"
        ) from error
    raise AssertionError(f"{what}: expected {names}, but it was accepted")


def tensors(value: Any) -> list[Tensor]:
    """The tensors in nested containers."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors(v)]
    return [t for v in value for t in tensors(v)] if isinstance(value, list | tuple) else []
