"""A subclass of a known layer is read right, or AdamW trains it; nothing raises in a pass."""

from __future__ import annotations

import copy
import warnings
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from singd import KFAC, SINGD, SOAP, KLShampoo

Forward = Callable[[Any, Any], Any]
READ = ""
"""What is expected where a layer is read right; otherwise the reason of the warning."""

Named = namedtuple("Named", "y z")


def subclass(base: type[nn.Module], forward: Callable[..., Any]) -> Any:
    """A subclass with another ``forward``, which is given the module and the base's forward."""
    return type(
        base.__name__,
        (base,),
        {"forward": lambda self, *args: forward(self, lambda *a: base.forward(self, *a), *args)},
    )


class Around(nn.Module):
    """Something before and after a layer under test, and a head for classes."""

    def __init__(self, layer: nn.Module, width: int, before: Any = None, after: Any = None) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 3)
        self.before, self.after = before or (lambda x: (x,)), after or (lambda y: y)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.after(self.layer(*self.before(x))).flatten(1))
        return y


def linear(forward: Any, *, width: int = 6, d_in: int = 4, **options: Any) -> Any:
    return lambda: Around(subclass(nn.Linear, forward)(d_in, 6), width, **options)


def rows() -> Tensor:
    return torch.randn(9, 4)


def sequences() -> Tensor:
    return torch.randn(5, 7, 4)


def images() -> Tensor:
    return torch.randn(5, 2, 6, 6)


def tokens() -> Tensor:
    return torch.randint(5, (9, 7))


def nested() -> Tensor:
    return torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(5, 4)], layout=torch.jagged)


def padded(y: Any) -> Any:
    return y.to_padded_tensor(0.0).mean(1)


def conv(base: Any, forward: Any, width: int, *args: Any, **options: Any) -> Any:
    return lambda: Around(subclass(base, forward)(2, 3, 3, *args, **options), width)


def embedding(forward: Any, rows: int = 5, **options: Any) -> Any:
    return lambda: Around(subclass(nn.Embedding, forward)(rows, 4, **options), 28)


def positions(self: Any, base: Any, x: Tensor) -> Tensor:
    return x + base(torch.arange(x.shape[1]))


def standardised(self: Any, base: Any, x: Tensor) -> Tensor:
    w = self.weight
    w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-3)
    return F.conv2d(x, w, self.bias)


def channels_first(self: Any, base: Any, x: Tensor) -> Tensor:
    y: Tensor = base(x.movedim(1, -1)).movedim(-1, 1)
    return y


def same(self: Any, base: Any, x: Tensor) -> Tensor:
    y: Tensor = base(F.pad(x, (1, 1, 1, 1)))
    return y


USED_OTHERWISE = "does not explain the gradient"
CANNOT_READ = "cannot read it"

CASES: dict[str, tuple[Any, Callable[[], Tensor], str]] = {
    # Read right
    "scaled weight": (linear(lambda s, b, x: F.linear(x, 0.3 * s.weight, s.bias)), rows, READ),
    "straight through": (
        linear(lambda s, b, x: F.linear(x, s.weight + (s.weight.sign() - s.weight).detach())),
        rows,
        READ,
    ),
    "added adapter": (linear(lambda s, b, x: b(x) + x.mean(-1, keepdim=True)), rows, READ),
    "autocast inside": (
        linear(lambda s, b, x: torch.autocast("cpu", torch.bfloat16)(b)(x).float()),
        rows,
        READ,
    ),
    "tensor subclass": (
        linear(lambda s, b, x: b(x.as_subclass(type("Sub", (Tensor,), {})))),
        rows,
        READ,
    ),
    "tuple": (linear(lambda s, b, x: (b(x), None), after=lambda y: y[0]), rows, READ),
    "image that is cast": (
        conv(nn.Conv2d, lambda s, b, x: b(x.float() / 255), 48),
        lambda: torch.randint(255, (5, 2, 6, 6), dtype=torch.uint8),
        READ,
    ),
    "scaled embedding": (embedding(lambda s, b, i: 2.0 * b(i)), tokens, READ),
    # Trained by AdamW
    "negative weight": (linear(lambda s, b, x: F.linear(x, -s.weight)), rows, USED_OTHERWISE),
    "normalised weight": (
        linear(lambda s, b, x: F.linear(F.normalize(x), F.normalize(s.weight))),
        rows,
        USED_OTHERWISE,
    ),
    "activation inside": (linear(lambda s, b, x: F.gelu(b(x))), rows, USED_OTHERWISE),
    "two inputs": (
        linear(lambda s, b, x, y: b(x + y), before=lambda x: (x, 3 * x.square())),
        rows,
        USED_OTHERWISE,
    ),
    "list of inputs": (
        linear(lambda s, b, xs: b(torch.cat(xs, -1)), before=lambda x: (list(x.split(2, -1)),)),
        rows,
        "list is its input",
    ),
    "dict": (linear(lambda s, b, x: {"y": b(x)}, after=lambda y: y["y"]), rows, "dict is its out"),
    "named tuple": (
        linear(lambda s, b, x: Named(b(x), None), after=lambda y: y.y),
        rows,
        "Named is its output",
    ),
    "heads": (
        linear(lambda s, b, x: b(x).unflatten(-1, (2, 3)).transpose(1, 2), width=42),
        sequences,
        CANNOT_READ,
    ),
    "channels first": (linear(channels_first, width=24, d_in=7), sequences, CANNOT_READ),
    "square channels first": (
        lambda: Around(subclass(nn.Linear, channels_first)(4, 4), 16),
        lambda: torch.randn(5, 4, 4),
        USED_OTHERWISE,
    ),
    "own padding": (conv(nn.Conv2d, same, 108), images, CANNOT_READ),
    "causal": (
        conv(nn.Conv1d, lambda s, b, x: b(x)[..., :-2], 18, padding=2),
        lambda: torch.randn(5, 2, 6),
        CANNOT_READ,
    ),
    "standardised weight": (conv(nn.Conv2d, standardised, 48), images, USED_OTHERWISE),
    "channels last image": (
        conv(nn.Conv2d, lambda s, b, x: b(x.permute(0, 3, 1, 2)), 48),
        lambda: torch.randn(5, 6, 6, 2),
        CANNOT_READ,
    ),
    "norm, channels first": (
        lambda: Around(subclass(nn.LayerNorm, channels_first)(2), 72),
        images,
        CANNOT_READ,
    ),
    "modulated norm": (
        lambda: Around(subclass(nn.LayerNorm, lambda s, b, x: b(x) * (1 + x.sin()))(4), 4),
        rows,
        USED_OTHERWISE,
    ),
    "frequencies": (
        embedding(lambda s, b, i: b(i), scale_grad_by_freq=True),
        lambda: tokens() * torch.randint(2, (9, 7)),
        USED_OTHERWISE,
    ),
    "shifted embedding": (embedding(lambda s, b, i: b(i + 2), 7), tokens, USED_OTHERWISE),
    "positions": (embedding(positions, 7), sequences, CANNOT_READ),
    "nested": (linear(lambda s, b, x: b(x), after=padded), nested, "a nested tensor is its input"),
    "sparse": (
        linear(lambda s, b, x: b(x)),
        lambda: torch.eye(4).to_sparse(),
        "a tensor of torch.sparse_coo is its input",
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", [SINGD, KFAC])
def test_a_subclass_is_read_right_or_trained_by_adamw(method: Any, name: str) -> None:
    make, draw, expected = CASES[name]
    model, x = make(), draw()
    bare = copy.deepcopy(model)
    options: dict[str, Any] = {"layers": "all"} if method is SINGD else {}
    optimizer = method(model, T=1, lr=0.05, kl_clip=1e-2, graft=None, **options)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with warnings.catch_warnings(record=True, action="always") as caught:
        for step in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            if step == 0:
                bare(x).square().mean().backward()
                for p, q in zip(model.parameters(), bare.parameters(), strict=True):
                    assert (p.grad is None) == (q.grad is None)
                    torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0)
            optimizer.step()
    said = [w for w in caught if "AdamW trains it instead" in str(w.message)]
    is_known = not isinstance(model.layer, nn.Embedding | nn.LayerNorm) or method is SINGD
    if expected == READ or not is_known:
        assert not said
    else:
        (warning,) = said
        assert str(warning.message).startswith("layer.weight: ")
        assert warning.filename == __file__
        assert expected in str(warning.message)
    used = {n for n, p in model.named_parameters() if p.grad is not None}
    assert used >= {"layer.weight", "head.weight"}
    assert not [n for n in used if torch.equal(model.get_parameter(n), before[n])]


@pytest.mark.parametrize("method", [KLShampoo, SOAP])
@pytest.mark.parametrize("step", ["step", "precondition"])
def test_methods_of_gradients_refuse_sparse_ones(method: Any, step: str) -> None:
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 3))
    optimizer = method(model)
    model(torch.tensor([0, 1])).square().sum().backward()
    with pytest.raises(RuntimeError, match=r"0\.weight: expected a dense gradient"):
        getattr(optimizer, step)()


def test_an_embedding_with_sparse_gradients_is_left_to_adamw_which_refuses_them() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 3))
    optimizer = SINGD(model, T=1, lr=0.05, layers="all")
    before = model[1].weight.detach().clone()
    model(torch.tensor([0, 1])).square().sum().backward()
    with pytest.raises(
        RuntimeError, match=r"0\.weight: expected a dense gradient, got a sparse one"
    ):
        optimizer.step()
    assert torch.equal(model[1].weight, before)
    optimizer.precondition()  # of the others; a sparse gradient may be another optimizer's
    assert not torch.equal(model[1].weight.grad, torch.zeros(3, 4))
