"""The laws that every method keeps, and :func:`check_method`, which finds where one does not.

    >>> check_method(lambda model, params=None: SINGD(model, params))

With pytest, one test for each law::

    @pytest.mark.parametrize("law", LAWS)
    def test_law(law):
        check_method(make, laws=[law])

Each law trains a small network in float64, with a convolution and equal linear layers, by what
``make`` returns, on the public interface of the optimizer alone.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from singd.methods.base import Method
from singd.optimizer import KroneckerOptimizer

Make = Callable[..., KroneckerOptimizer]
Law = Callable[[Make], None]

TOLERANCE = 1e-9
"""Relative difference of numbers in float64 that rounding may explain."""


def check_method(make: Make, *, laws: Iterable[str] | None = None) -> None:
    """Raise unless the method of an optimizer keeps the laws.

    Args:
        make: ``make(model, params)`` returns the optimizer, with the options to be checked, which
            should update factors at every step or two; ``params`` as in :mod:`torch.optim`.
        laws: Names from :data:`LAWS`; all of them by default.

    Raises:
        AssertionError: Names the law, and says what was expected and what is there.
        ValueError: If a law is unknown.
    """
    for name in LAWS if laws is None else laws:
        if name not in LAWS:
            raise ValueError(f"expected one of the laws {', '.join(LAWS)}, got {name!r}")
        law = LAWS[name]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                law(make)
            except Exception as error:
                meaning = (inspect.getdoc(law) or "").splitlines()[0]
                raise AssertionError(
                    f"law {name!r} fails: {type(error).__name__}: {error}\n  the law: {meaning}"
                ) from error


# Laws --------------------------------------------------------------------------------------------


def descends(make: Make) -> None:
    """Directions descend: ``<D, G> > 0`` for the gradient ``G`` of every weight, at every step."""
    model = _network()
    optimizer = make(model, None)
    for x, y in _batches(6):
        _backward(model, x, y)
        gradients = {name: _grad(p).clone() for name, p in model.named_parameters()}
        optimizer.precondition()
        for name, p in model.named_parameters():
            product = float((_grad(p) * gradients[name]).sum())
            if p.ndim > 1 and not product > 0:
                raise AssertionError(f"{name}: expected <D, G> > 0, got {product:g}")
            p.data.sub_(0.01 * gradients[name])


def stack(make: Make) -> None:
    """Equal weights side by side are treated as each of them alone."""
    together, alone = _network(), _network()
    groups = [{"params": list(m.parameters())} for m in alone if list(m.parameters())]
    one, many = make(together, None), make(alone, groups)
    for x, y in _batches(4):
        _train(together, one, [(x, y)])
        _train(alone, many, [(x, y)])
    _assert_same("weights", list(together.parameters()), list(alone.parameters()))


def micro_batches(make: Make) -> None:
    """A batch in two halves, whose gradients are added up, makes the step of the whole batch."""
    whole, halves = _network(), _network()
    one, other = make(whole, None), make(halves, None)
    for x, y in _batches(4):
        _train(whole, one, [(x, y)])
        _train(halves, other, list(zip(x.chunk(2), y.chunk(2), strict=True)))
    _assert_same("weights", list(whole.parameters()), list(halves.parameters()))


def no_statistics(make: Make) -> None:
    """A step in which a weight has no gradient leaves its factors as they are."""
    model = _network()
    optimizer = make(model, None)
    _train(model, optimizer, _batches(3), each=True)
    weight = next(model[2].parameters())
    before = _tensors(optimizer.state[weight])
    for x, y in _batches(3):
        optimizer.zero_grad()
        _backward(model[3:], model[:3](x).detach(), y)
        optimizer.step()
    _assert_same("state of a weight without gradient", before, _tensors(optimizer.state[weight]))


def pure(make: Make) -> None:
    """A skipped step changes nothing: factors that are given to the method are not written to."""
    model = _network()
    optimizer = make(model, None)
    _train(model, optimizer, _batches(3), each=True)
    before = [t for p in model.parameters() for t in (p, *_tensors(optimizer.state[p]))]
    before = [t.detach().clone() for t in before]
    for x, y in _batches(2):  # factors are due at one of them
        optimizer.zero_grad()
        _backward(model, x, y)
        _grad(next(model[0].parameters())).view(-1)[0] = torch.inf
        optimizer.step()
    after = [t for p in model.parameters() for t in (p, *_tensors(optimizer.state[p]))]
    _assert_same("weights and state after a skipped step", before, after, exactly=True)


def apart(make: Make) -> None:
    """Weights and biases that are given apart train as both joined do, and gradients stay."""
    model, other = _network(), _network()
    batches = _batches(3)
    with patch.object(Method, "speaks_for", return_value=False):
        joined = make(other, None)
        for batch in batches:
            _train(other, joined, [batch])
    optimizer = make(model, None)
    for x, y in batches:
        optimizer.zero_grad()
        _backward(model, x, y)
        before = [_grad(p).clone() for p in model.parameters()]
        optimizer.step()
        _assert_same("gradients", before, [_grad(p) for p in model.parameters()], exactly=True)
    _assert_same("weights and biases", list(other.parameters()), list(model.parameters()))


def meta_shapes(make: Make) -> None:
    """``init`` on the meta device has the shapes of the state: the plan tells its bytes."""
    model = _network()
    optimizer = make(model, None)
    planned = make(copy.deepcopy(model).to("meta"), None).plan().state_bytes
    _train(model, optimizer, _batches(2), each=True)
    stored = sum(t.nbytes for p in model.parameters() for t in _tensors(optimizer.state[p]))
    if stored != planned:
        raise AssertionError(f"state: expected {planned} bytes as in plan(), got {stored}")


def round_trip(make: Make) -> None:
    """Training goes on from ``state_dict()`` as if it had not been interrupted."""
    model = _network()
    optimizer = make(model, None)
    _train(model, optimizer, _batches(3), each=True)
    resumed = copy.deepcopy(model)
    other = make(resumed, None)
    other.load_state_dict(optimizer.state_dict())
    for x, y in _batches(3):
        _train(model, optimizer, [(x, y)])
        _train(resumed, other, [(x, y)])
    _assert_same("weights", list(model.parameters()), list(resumed.parameters()))


def low_precision(make: Make) -> None:
    """In float32 and bfloat16 no step is skipped, and numbers stay finite."""
    for dtype in (torch.float32, torch.bfloat16):
        model = _network().to(dtype)
        optimizer = make(model, None)
        for x, y in _batches(10):
            _train(model, optimizer, [(x.to(dtype), y.to(dtype))])
        tensors = [t for p in model.parameters() for t in (p, *_tensors(optimizer.state[p]))]
        if optimizer.skipped or not all(bool(t.isfinite().all()) for t in tensors):
            raise AssertionError(
                f"{dtype}: expected finite numbers, got others in {optimizer.skipped} of 10 steps"
            )


LAWS: Mapping[str, Law] = MappingProxyType(
    {
        law.__name__: law
        for law in (
            descends,
            stack,
            micro_batches,
            no_statistics,
            pure,
            apart,
            meta_shapes,
            round_trip,
            low_precision,
        )
    }
)
"""The laws by name."""


# What they train ---------------------------------------------------------------------------------


def _network() -> nn.Sequential:
    """The same network each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(2, 3, 3),
            nn.Flatten(),
            nn.Linear(12, 5),
            nn.Tanh(),
            nn.Linear(5, 5),
            nn.Tanh(),
            nn.Linear(5, 5),
            nn.Tanh(),
            nn.Linear(5, 3),
        ).double()


def _batches(count: int) -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.randn(8, 2, 4, 4, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64))
        for _ in range(count)
    ]


def _backward(model: nn.Module, x: Tensor, y: Tensor, weight: float = 1.0) -> Tensor:
    loss = weight * (model(x) - y).square().mean()
    loss.backward()
    return loss.detach()


def _train(
    model: nn.Module,
    optimizer: KroneckerOptimizer,
    batches: Sequence[tuple[Tensor, Tensor]],
    each: bool = False,
) -> None:
    """One step on all batches, or on each of them."""
    for some in [[batch] for batch in batches] if each else [batches]:
        optimizer.zero_grad()
        for x, y in some:
            _backward(model, x, y, 1 / len(some))
        optimizer.step()


def _grad(p: Tensor) -> Tensor:
    if p.grad is None:
        raise AssertionError("expected a gradient, got none")
    return p.grad


def _tensors(entry: Mapping[str, Any]) -> list[Tensor]:
    """Copies of the tensors in the state of a parameter."""
    values = [v if isinstance(v, list) else [v] for v in entry.values()]
    return [t.detach().clone() for each in values for t in each if isinstance(t, Tensor)]


def _assert_same(
    what: str, expected: Sequence[Tensor], got: Sequence[Tensor], exactly: bool = False
) -> None:
    if len(expected) != len(got):
        raise AssertionError(f"{what}: expected {len(expected)} tensors, got {len(got)}")
    for number, (e, g) in enumerate(zip(expected, got, strict=True)):
        e, g = e.detach().double(), g.detach().double()
        difference = float((e - g).norm() / e.norm().clamp(min=1e-30))
        if e.shape != g.shape or not difference <= (0.0 if exactly else TOLERANCE):
            raise AssertionError(
                f"{what}: expected the same tensor {number}, got a relative difference of "
                f"{difference:.1e}"
            )
