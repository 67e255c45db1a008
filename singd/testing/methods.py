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
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from unittest.mock import patch

import torch
from torch import Tensor

from singd.methods.base import Method
from singd.optimizer import KroneckerOptimizer
from singd.testing.training import assert_same, backward, batches, grad, network, tensors, train

Make = Callable[..., KroneckerOptimizer]
Law = Callable[[Make], None]


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
    """Directions descend: ``<D, G> > 0`` in every layer, also if its weight or bias alone has one.

    ``G`` is the gradient. A bias beside a weight may move against its own: the other is then zero.
    """
    for name, has_gradient in _PARTS.items():
        model = network()
        optimizer = make(model, None)
        for x, y in batches(6):
            optimizer.zero_grad()
            backward(model, x, y)
            gradients = {}
            for p in model.parameters():
                gradients[p] = grad(p).clone()
                grad(p).mul_(has_gradient(p))
            before = {p: grad(p).clone() for p in model.parameters()}
            optimizer.precondition()
            for place, layer in model.named_children():
                own = list(layer.parameters())
                if not any(has_gradient(p) for p in own):
                    continue
                product = float(sum((grad(p) * before[p]).sum() for p in own))
                if not product > 0:
                    raise AssertionError(
                        f"{name} of {layer} at {place}: expected <D, G> > 0, got {product:g}"
                    )
            for p, g in gradients.items():
                p.data.sub_(0.01 * g)


_PARTS: dict[str, Callable[[Tensor], bool]] = {
    "weight and bias": lambda p: True,
    "weight": lambda p: p.ndim > 1,
    "bias": lambda p: p.ndim == 1,
}


def stack(make: Make) -> None:
    """Equal weights side by side are treated as each of them alone."""
    together, alone = network(), network()
    groups = [{"params": list(m.parameters())} for m in alone if list(m.parameters())]
    one, many = make(together, None), make(alone, groups)
    for x, y in batches(4):
        train(together, one, [(x, y)])
        train(alone, many, [(x, y)])
    assert_same("weights", list(together.parameters()), list(alone.parameters()))


def micro_batches(make: Make) -> None:
    """A batch in two halves, whose gradients are added up, makes the step of the whole batch."""
    whole, halves = network(), network()
    one, other = make(whole, None), make(halves, None)
    for x, y in batches(4):
        train(whole, one, [(x, y)])
        train(halves, other, list(zip(x.chunk(2), y.chunk(2), strict=True)))
    assert_same("weights", list(whole.parameters()), list(halves.parameters()))


def no_statistics(make: Make) -> None:
    """A step in which a weight has no gradient leaves its factors as they are."""
    model = network()
    optimizer = make(model, None)
    train(model, optimizer, batches(3), each=True)
    weight = next(model[2].parameters())
    before = tensors(optimizer.state[weight])
    for x, y in batches(3):
        optimizer.zero_grad()
        backward(model[3:], model[:3](x).detach(), y)
        optimizer.step()
    assert_same("state of a weight without gradient", before, tensors(optimizer.state[weight]))


def pure(make: Make) -> None:
    """A skipped step changes nothing: factors that are given to the method are not written to."""
    model = network()
    optimizer = make(model, None)
    train(model, optimizer, batches(3), each=True)
    before = [t for p in model.parameters() for t in (p, *tensors(optimizer.state[p]))]
    before = [t.detach().clone() for t in before]
    for x, y in batches(2):  # factors are due at one of them
        optimizer.zero_grad()
        backward(model, x, y)
        grad(next(model[0].parameters())).view(-1)[0] = torch.inf
        optimizer.step()
    after = [t for p in model.parameters() for t in (p, *tensors(optimizer.state[p]))]
    assert_same("weights and state after a skipped step", before, after, exactly=True)


def gradients_stay(make: Make) -> None:
    """A step leaves gradients as they are: a direction is a new tensor.

    Of a layer without a bias the method is given the memory of the gradient itself.
    """
    model = network()
    optimizer = make(model, None)
    for x, y in batches(3):
        optimizer.zero_grad()
        backward(model, x, y)
        before = [grad(p).clone() for p in model.parameters()]
        optimizer.step()
        assert_same("gradients", before, [grad(p) for p in model.parameters()], exactly=True)


def apart(make: Make) -> None:
    """Weights and biases that are given apart train as both joined do."""
    model, other = network(), network()
    data = batches(3)
    with patch.object(Method, "speaks_for", return_value=False):
        train(other, make(other, None), data, each=True)
    train(model, make(model, None), data, each=True)
    assert_same("weights and biases", list(other.parameters()), list(model.parameters()))


def meta_shapes(make: Make) -> None:
    """``init`` on the meta device has the shapes of the state: the plan tells its bytes."""
    model = network()
    optimizer = make(model, None)
    planned = make(copy.deepcopy(model).to("meta"), None).plan().state_bytes
    train(model, optimizer, batches(2), each=True)
    stored = sum(t.nbytes for p in model.parameters() for t in tensors(optimizer.state[p]))
    if stored != planned:
        raise AssertionError(f"state: expected {planned} bytes as in plan(), got {stored}")


def round_trip(make: Make) -> None:
    """Training goes on from ``state_dict()`` as if it had not been interrupted."""
    model = network()
    optimizer = make(model, None)
    train(model, optimizer, batches(3), each=True)
    resumed = copy.deepcopy(model)
    other = make(resumed, None)
    other.load_state_dict(optimizer.state_dict())
    for x, y in batches(3):
        train(model, optimizer, [(x, y)])
        train(resumed, other, [(x, y)])
    assert_same("weights", list(model.parameters()), list(resumed.parameters()))


def low_precision(make: Make) -> None:
    """In float32 and bfloat16 no step is skipped, and numbers stay finite."""
    for dtype in (torch.float32, torch.bfloat16):
        model = network().to(dtype)
        optimizer = make(model, None)
        for x, y in batches(10):
            train(model, optimizer, [(x.to(dtype), y.to(dtype))])
        made = [t for p in model.parameters() for t in (p, *tensors(optimizer.state[p]))]
        if optimizer.skipped or not all(bool(t.isfinite().all()) for t in made):
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
            gradients_stay,
            apart,
            meta_shapes,
            round_trip,
            low_precision,
        )
    }
)
"""The laws by name."""
