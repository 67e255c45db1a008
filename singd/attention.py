"""Attention modules: four matrix products inside one function, which calls no module for them.

Given a :class:`_Query`, :func:`torch.nn.functional.multi_head_attention_forward` runs as it is but
for its projections, whose inputs and outputs are shown to whoever listens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from singd._layer import Layer

#: Is given the name of a product, its input and its output, both ``[L, N, d]``; returns the output.
Tap = Callable[[str, Tensor, Tensor], Tensor]


class InProjection(Layer):
    """Queries, keys and values from one weight ``[3 d, d]``: three products side by side."""

    weight, bias = "in_proj_weight", "in_proj_bias"
    parts = 3

    def shape(self, module: Any) -> tuple[int, ...]:
        """``(3, d, d)``."""
        return 3, module.embed_dim, module.embed_dim


class Projection(Layer):
    """Queries, keys or values from a weight of their own. The bias is stored with that of others.

    Args:
        name: ``"q"``, ``"k"`` or ``"v"``.
    """

    joins_bias = False

    def __init__(self, name: str) -> None:
        self.weight = f"{name}_proj_weight"


class Attention(Layer):
    """Attention: its projections of queries, keys and values; that of its output is a module."""

    packed = InProjection()
    separate = tuple(Projection(name) for name in "qkv")

    def products(self, module: Any) -> Sequence[Layer]:
        """One packed layer, or three where keys and values have sizes of their own."""
        return self.separate if module.in_proj_weight is None else [self.packed]


def uses(module: Any) -> dict[str, tuple[int, nn.Module, int]]:
    """The id of the weight, the module and the part of every product in an attention module."""
    if module.in_proj_weight is not None:
        found = {name: (module.in_proj_weight, module, i) for i, name in enumerate("qkv")}
    else:
        found = {name: (getattr(module, f"{name}_proj_weight"), module, 0) for name in "qkv"}
    found["out"] = (module.out_proj.weight, module.out_proj, 0)
    return {name: (id(weight), *use) for name, (weight, *use) in found.items()}


class _Query(Tensor):
    """The query of an attention module that is listened to; what is made of it is a plain tensor.

    Except by the transposition that such a module begins with.
    """

    taps: list[Tap]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        query = next((a for a in args if isinstance(a, _Query)), None)
        if func is F.multi_head_attention_forward and query is not None:
            return _attend(query.taps, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if func is Tensor.transpose and query is not None:
            result = result.as_subclass(cls)
            result.taps = query.taps
        return result


@torch.compiler.disable
def _attend(taps: Sequence[Tap], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The function itself, on plain tensors; not compiled, for taps come and go."""
    plain = {id(a): a.as_subclass(Tensor) for a in args if isinstance(a, _Query)}
    return _listened(taps)(*(plain.get(id(a), a) for a in args), **kwargs)


def _listened(taps: Sequence[Tap]) -> Callable[..., Any]:
    """PyTorch's function, with names of its own for the projections."""
    size: list[int] = []

    def tapped(name: str, x: Tensor, output: Tensor) -> Tensor:
        for tap in taps:
            output = tap(name, x, output)
        return output

    def project(function: Callable[..., Any]) -> Callable[..., Any]:
        def projected(q: Tensor, k: Tensor, v: Tensor, *weights: Any) -> list[Tensor]:
            size[:] = q.shape[:2]
            # What a product would copy for itself is copied here, to be kept once.
            rows = {id(x): x.contiguous() for x in (q, k, v)}
            q, k, v = (rows[id(x)] for x in (q, k, v))
            outputs = function(q, k, v, *weights)
            return [tapped(*use) for use in zip("qkv", (q, k, v), outputs, strict=True)]

        return projected

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output = F.linear(x, weight, bias)
        return tapped("out", x.view(*size, -1), output.view(*size, -1)).view_as(output)

    names = {name: project(vars(F)[name]) for name in ("_in_projection_packed", "_in_projection")}
    names |= {"linear": linear, "has_torch_function": lambda _: False}
    function: Any = F.multi_head_attention_forward
    return FunctionType(function.__code__, vars(F) | names, argdefs=function.__defaults__)


def listened(args: tuple[Any, ...], kwargs: Mapping[str, Any], tap: Tap) -> tuple[Any, Any]:
    """The arguments of an attention module, such that its products pass through ``tap``."""
    query = args[0] if args else next(iter(kwargs.values()))
    if not isinstance(query, _Query):
        plain, query = query, query.as_subclass(_Query)
        query.taps = []
        args = tuple(query if a is plain else a for a in args)
        kwargs = {k: query if a is plain else a for k, a in kwargs.items()}
    query.taps.append(tap)
    return args, kwargs


@torch.compiler.disable
def unwrap(module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook: a subclass of attention that returns its query returns a plain tensor."""
    if isinstance(output, tuple | list):
        return type(output)(unwrap(module, args, o) for o in output)
    return output.as_subclass(Tensor) if isinstance(output, _Query) else output
