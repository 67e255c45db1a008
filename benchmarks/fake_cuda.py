"""A GPU that is not there: PyTorch's fake tensors know their device and hold no numbers.

So steps go the way they go on CUDA, operator by operator; what mixes devices is an error, and so is
to read a number. Copies between host and device are counted. Kernels are taken for granted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from singd.capture.accumulator import Accumulator
from singd.capture.capture import Capture
from singd.capture.hooks import unseen_reason
from singd.capture.samples import Call
from singd.capture.weight_matrix import WeightMatrix
from singd.ops import reductions, stochastic_rounding
from structured import Operator
from structured.costs import FREE

aten: Any = torch.ops.aten
Shapes = dict[str, tuple[torch.Size, torch.Size]]  # of input and output, by module
DEVICE = torch.device("cuda", 0)


class Crossings(TorchDispatchMode):
    """Names the copies between host and device; numbers that the host knows are none.

    Counts operators there as well: all but those that make a view or an empty tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        works = not (func.is_view or name in FREE or func.namespace.startswith("prim"))
        self.operators += works and any(t.is_cuda for t in tensors)
        copied = func.overloadpacket in (aten._to_copy, aten.copy_, aten._foreach_copy_)
        if copied and len({t.device.type for t in tensors}) > 1:
            to = tree_leaves(out)[0] if func.overloadpacket is aten._to_copy else args[0]
            self.found.append(f"to {to.device.type}")
        return out


class _ByOperators(TorchFunctionMode):
    """What Python does in C++ that wants the device itself, by operators that do not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            return _view(*args)
        if func is Tensor.__setitem__:
            place, value = _view(*args[:2]), args[2]
            fill = aten.copy_ if isinstance(value, Tensor) else aten.fill_
            return fill(place, value)
        if func is Tensor.__invert__:
            return aten.bitwise_not(*args)
        if func is Tensor.copy_:
            return aten.copy_(*args)
        if func is Tensor.contiguous:
            t, order = args[0], torch.contiguous_format
            return t if t.is_contiguous() else aten.clone(t, memory_format=order)
        if func is torch._fused_adamw_ and isinstance(kwargs["lr"], Tensor):
            kwargs = {**kwargs, "lr": 1.0}  # the kernel reads it on the device; no fake form does
        for operator in args:
            if isinstance(operator, Operator):
                with self:  # else what it computes would be seen by nobody
                    return operator.__torch_function__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


def _view(t: Tensor, key: Any) -> Tensor:
    """``t[key]``."""
    keys = key if isinstance(key, tuple) else (key,)
    rest = t.ndim - sum(k is not None and k is not Ellipsis for k in keys)
    dim = 0
    for k in keys:
        if isinstance(k, slice):
            t = aten.slice(t, dim, k.start, k.stop, k.step or 1)
        elif isinstance(k, Tensor):
            t = aten.index_select(t, dim, k)
        elif k is None:
            t = aten.unsqueeze(t, dim)
        elif k is not Ellipsis:
            t = aten.select(t, dim, k)
            continue
        dim += rest if k is Ellipsis else 1
    return t


@contextmanager
def gpu() -> Iterator[Crossings]:
    """Within this context a GPU is there, and copies to and from it are counted."""
    with ExitStack() as stack:
        for cached in (reductions._cached_repeat, stochastic_rounding.name_keys):  # of tensors
            cached.cache_clear()
            stack.callback(cached.cache_clear)
        for name in ("torch.cuda.Event", "torch.cuda.current_stream"):
            stack.enter_context(mock.patch(name))
        stack.enter_context(mock.patch.object(Capture, "watch", _watch_without_hooks))
        stack.enter_context(FakeTensorMode())
        crossings = stack.enter_context(Crossings())
        stack.enter_context(_ByOperators())
        yield crossings


def _watch_without_hooks(capture: Capture, _: nn.Module, matrices: Iterable[WeightMatrix]) -> None:
    """What :func:`backward` needs: gradients on a fake device take no hooks."""
    capture.accumulators |= {matrix: Accumulator(matrix, unseen_reason()) for matrix in matrices}


def shapes(model: nn.Module, x: Tensor) -> Shapes:
    """What every module of a model sees that is called with one tensor, by its name.

    Args:
        model: Model on the device "meta".
        x: Its input there.
    """
    seen: Shapes = {}
    handles = []
    for name, module in model.named_modules():

        def see(_: nn.Module, args: tuple[Any, ...], out: Any, name: str = name) -> None:
            if len(args) == 1 and isinstance(out, Tensor):
                seen[name] = args[0].shape, out.shape

        handles.append(module.register_forward_hook(see))
    model(x)
    for handle in handles:
        handle.remove()
    return seen


def move(model: nn.Module, dtype: torch.dtype) -> None:
    """Put the parameters on the GPU; that has to be there."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                there = torch.empty(p.shape, device=DEVICE, dtype=dtype)
                module._parameters[name] = moved.setdefault(id(p), nn.Parameter(there))


@torch.no_grad()
def backward(
    optimizer: Any, seen: Shapes, dtype: torch.dtype, unused: Collection[str] = ()
) -> None:
    """Put in place what a backward pass leaves.

    Args:
        optimizer: One of ours.
        seen: What the layers of its model saw.
        dtype: Data type of what they see.
        unused: Layers that no gradient reaches.
    """
    names = {module: name for name, module in optimizer.model.named_modules()}
    capture, call = optimizer._parts.capture, Call()
    for matrix, accumulator in capture.accumulators.items():
        verification = accumulator.verification
        verification.explained, verification.passes = True, 5  # else it is verified, which waits
        accumulator.last_call = capture.step
        name = names[matrix.module]
        if name not in unused and optimizer._observer.is_captured(matrix):
            x, g = (torch.empty(shape, device=DEVICE, dtype=dtype) for shape in seen[name])
            capture._observe(matrix, matrix.module, x, g, call, -1)
            capture.commit(matrix, matrix.weight)
    for module, name in names.items():
        for p in module.parameters(recurse=False):
            p.grad = None if name in unused else torch.empty_like(p)
