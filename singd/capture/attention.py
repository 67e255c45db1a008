"""How the projections of an attention module are watched, which no module is called for.

Given a :class:`_Query`, :func:`torch.nn.functional.multi_head_attention_forward` runs as it is but
for its projections, whose inputs and outputs are shown to a function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Is given the name of a product, its input and its output, both ``[L, N, d]``; returns the output.
Watcher = Callable[[str, Tensor, Tensor], Tensor]


def projections(module: Any) -> dict[str, tuple[Tensor, str, nn.Module]]:
    """The weight, the label of its rows and the module of every product in an attention module."""
    if module.in_proj_weight is not None:
        found: dict[str, tuple[Tensor, str, nn.Module]] = {
            name: (module.in_proj_weight, name, module) for name in "qkv"
        }
    else:
        found = {name: (getattr(module, f"{name}_proj_weight"), "", module) for name in "qkv"}
    return found | {"out": (module.out_proj.weight, "", module.out_proj)}


class _Query(Tensor):
    """The query of an attention module that is watched; what is made of it is a plain tensor.

    Except by the transposition that such a module begins with. Attention and transposition run
    outside compiled code: watchers come and go, and some compilers refuse this type.
    """

    watchers: list[Watcher]
    run: Callable[..., Any]  # :func:`run`, never compiled

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        query = next((a for a in args if isinstance(a, _Query)), None)
        if query is not None and func in (F.multi_head_attention_forward, Tensor.transpose):
            return query.run(func, query, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def run(func: Any, query: _Query, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Attention, which is watched, or a transposed query; inside tensors are plain."""
    plain = {id(a): a.as_subclass(Tensor) for a in args if isinstance(a, _Query)}
    args = tuple(plain.get(id(a), a) for a in args)
    if func is Tensor.transpose:
        return _watched(func(*args, **kwargs), query.watchers, query.run)
    return _listened(query.watchers)(*args, **kwargs)


def _watched(x: Tensor, watchers: list[Watcher], run: Callable[..., Any]) -> _Query:
    query = x.as_subclass(_Query)
    query.watchers, query.run = watchers, run
    return query


def _listened(watchers: Sequence[Watcher]) -> Callable[..., Any]:
    """PyTorch's function, with names of its own for the projections."""
    size: list[int] = []

    def watched(name: str, x: Tensor, output: Tensor) -> Tensor:
        for watcher in watchers:
            output = watcher(name, x, output)
        return output

    def project(function: Callable[..., Any]) -> Callable[..., Any]:
        def projected(q: Tensor, k: Tensor, v: Tensor, *weights: Any) -> list[Tensor]:
            size[:] = q.shape[:2]
            # What a product would copy for itself is copied here, to be kept once.
            rows = {id(x): x.contiguous() for x in (q, k, v)}
            q, k, v = (rows[id(x)] for x in (q, k, v))
            outputs = function(q, k, v, *weights)
            return [watched(*use) for use in zip("qkv", (q, k, v), outputs, strict=True)]

        return projected

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output = F.linear(x, weight, bias)
        rows, sums = x.view(*size, x.shape[-1]), output.view(*size, output.shape[-1])
        return watched("out", rows, sums).view_as(output)

    names = {name: project(vars(F)[name]) for name in ("_in_projection_packed", "_in_projection")}
    names |= {"linear": linear, "has_torch_function": lambda _: False}
    function: Any = F.multi_head_attention_forward
    return FunctionType(function.__code__, vars(F) | names, argdefs=function.__defaults__)


def listened(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], watcher: Watcher, run: Callable[..., Any]
) -> tuple[Any, Any]:
    """The arguments of an attention module, such that its products pass through ``watcher``.

    ``run`` is :func:`run`, excluded from compilation.
    """
    query = args[0] if args else next(iter(kwargs.values()))
    if not isinstance(query, _Query):
        plain, query = query, _watched(query, [], run)
        args = tuple(query if a is plain else a for a in args)
        kwargs = {k: query if a is plain else a for k, a in kwargs.items()}
    query.watchers.append(watcher)
    return args, kwargs


def unwrap(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """Forward hook: a subclass of attention that returns its query returns a plain tensor."""
    if isinstance(output, tuple | list):
        return type(output)(unwrap(module, args, kwargs, o) for o in output)
    return output.as_subclass(Tensor) if isinstance(output, _Query) else output
