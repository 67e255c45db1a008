"""A GPU that is not there: PyTorch's fake tensors know their device and hold no numbers.

So steps go the way they go on CUDA, operator by operator; what mixes devices is an error, and so is
to read a number. Copies between host and device are counted. Kernels are taken for granted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from singd import joint

aten: Any = torch.ops.aten
DEVICE = torch.device("cuda", 0)


class Crossings(TorchDispatchMode):
    """Names the copies between host and device; numbers that the host knows are none.

    Counts operators as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators += 1
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
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
            t, kept = args[0], torch.contiguous_format
            return t if t.is_contiguous() else aten.clone(t, memory_format=kept)
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
    joint._repeated.cache_clear()
    with ExitStack() as stack:
        for name in ("kaiming_uniform_", "uniform_", "ones_", "zeros_"):
            stack.enter_context(mock.patch.object(nn.init, name))
        for name in ("torch.cuda.Event", "torch.cuda.current_stream", "singd.hooks.Capture.watch"):
            stack.enter_context(mock.patch(name))
        stack.enter_context(FakeTensorMode())
        crossings = stack.enter_context(Crossings())
        stack.enter_context(_ByOperators())
        yield crossings
    joint._repeated.cache_clear()


def network(dtype: torch.dtype, *, bias: bool = True) -> nn.Sequential:
    """Equal layers and others, and a normalization."""
    options = {"bias": bias, "device": DEVICE, "dtype": dtype}
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, **options),
        nn.Conv2d(8, 8, 3, groups=2, **options),
        nn.Linear(32, 16, **options),
        nn.LayerNorm(16, device=DEVICE, dtype=dtype),
        nn.Linear(16, 16, **options),
        nn.Linear(16, 16, **options),
    )


@torch.no_grad()
def backward(
    model: nn.Module,
    optimizer: Any,
    dtype: torch.dtype,
    *,
    unused: Collection[nn.Module] = (),
    samples: int = 8,
) -> None:
    """What a backward pass leaves behind, with inputs and output gradients in ``dtype``."""
    shapes: dict[type[nn.Module], Callable[[Any], tuple[tuple[int, ...], tuple[int, ...]]]] = {
        nn.Conv2d: lambda m: ((m.in_channels, 6, 6), (m.out_channels, 4, 4)),
        nn.Linear: lambda m: ((m.in_features,), (m.out_features,)),
        nn.LayerNorm: lambda m: (m.normalized_shape, m.normalized_shape),
    }
    for unit in optimizer._units:
        unit.explained, unit.committed = True, 5  # else it is looked at, which waits
        if unit.module not in unused and optimizer._wanted(unit):
            core = shapes[type(unit.module)](unit.module)
            x, g = (torch.empty(samples, *each, device=DEVICE, dtype=dtype) for each in core)
            optimizer._measure(unit, unit.module, x, g, 0, -1)
            unit.commit()
    for module in model.modules():
        for p in module.parameters(recurse=False):
            p.grad = None if module in unused else torch.empty_like(p)
