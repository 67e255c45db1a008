"""Hooks that show what a layer is used for, forwards and backwards.

The output of a hooked layer passes through :class:`_Watched`, an identity that saves the layer's
input the way autograd does. So the input is shared with autograd, freed with it, recomputed under
activation checkpointing, and there again for a second backward. In-place activations may follow.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from singd.capture import attention
from singd.capture.samples import is_dense
from singd.capture.transient import CLOSE, Hook, attach_after, attach_before
from singd.capture.weight_matrix import WeightMatrix

Listener = Callable[[Tensor, Tensor], None]
"""Called in the backward pass with input and output gradient."""

Listen = Callable[[WeightMatrix, nn.Module, Tensor], Listener | None]
"""Called in the forward pass with the input: who listens to this use of the module, if anybody."""


class _Watched(torch.autograd.Function):
    """The identity on a layer's output; its backward shows the layer's input and gradient.

    The input is detached: no gradient flows to it, which compiled autograd could not add up.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, listener: Listener, refuse: Callable[[str], None]
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.listener, ctx.refuse = listener, refuse
        return output.detach()  # a fresh tensor on the same memory: in-place operations may follow

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        if not is_batched(g):
            with torch.no_grad():
                x = _unchanged(ctx)
                if x is not None:
                    ctx.listener(x, g.detach())
        return g, None, None, None


def _unchanged(ctx: Any) -> Tensor | None:
    """The input that was saved, unless it was changed in place, which a layer need not mind.

    A layer that multiplied a copy, in another data type or order or with padding, has saved that.
    """
    try:
        x: Tensor = ctx.saved_tensors[0]
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        ctx.refuse("its input is changed in place after it was called")
        return None
    return x


def is_batched(g: Tensor) -> bool:
    """Whether a gradient is a stack of gradients, of a vectorized jacobian or the like."""
    if torch.compiler.is_compiling():  # by compiled autograd, which knows no stacks
        return False
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(g) or functorch.is_batchedtensor(g)


def is_watching() -> bool:
    """Whether what runs now is a forward pass that a backward pass may follow.

    Transforms of ``torch.func``, forward-mode differentiation and traces of the model are none.
    """
    return (
        torch.is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch._C._is_tracing()
        and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None
    )


class LayerHook(Hook):
    """The forward hook of one weight.

    ``refuse`` is given a reason if the module is used in a way that its layer does not know.
    """

    def __init__(
        self, matrix: WeightMatrix, listen: Listen, refuse: Callable[[WeightMatrix, str], None]
    ) -> None:
        self.matrix, self.listen, self.refuse = matrix, listen, refuse
        self.eager = torch.compiler.disable(self._run, reason=CLOSE)

    def attach(self) -> Iterator[Any]:
        """Register with every module that has the weight, before hooks that change its output."""
        for module in self.matrix.modules:
            yield attach_after(module, self, first=True)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Show the output to the listener; traced without gradients there is nothing to do."""
        if not torch.is_grad_enabled() or torch.compiler.is_exporting():
            return None
        return self.eager(module, args, kwargs, output)

    def _run(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not is_watching():
            return None
        x: Any = args[0] if args else next(iter(kwargs.values()), None)
        listener = self.listen(self.matrix, module, x)
        if listener is None:
            return None
        first = output[0] if type(output) in (tuple, list) and output else output
        for value, what in ((x, "input"), (first, "output")):
            if not is_dense(value):
                self.refuse(self.matrix, f"{_kind(value)} is its {what}, not a dense tensor")
                return None
        if not first.requires_grad:
            return None
        refuse = functools.partial(self.refuse, self.matrix)
        watched = _Watched.apply(first, x.detach(), listener, refuse)
        return watched if first is output else type(output)((watched, *output[1:]))


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return "a nested tensor" if value.is_nested else f"a tensor of {value.layout}"


class AttentionHook(Hook):
    """The hooks of an attention module, whose projections run without calling a module.

    ``products`` are the weight and the module of every projection that is watched, by its name.
    """

    def __init__(
        self,
        products: dict[str, tuple[WeightMatrix, nn.Module]],
        listen: Listen,
        refuse: Callable[[WeightMatrix, str], None],
    ) -> None:
        self.products, self.listen, self.refuse = products, listen, refuse
        self.run = torch.compiler.disable(attention.run)
        self.eager = torch.compiler.disable(self._run, reason=CLOSE)

    def attach(self, module: nn.Module) -> Iterator[Any]:
        """Register before and after the module's forward."""
        yield attach_before(module, self)
        yield attach_after(module, torch.compiler.disable(attention.unwrap))

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Show the projections to their listeners."""
        if not torch.is_grad_enabled() or torch.compiler.is_exporting():
            return None
        return self.eager(module, args, kwargs)

    def _run(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        query: Any = args[0] if args else next(iter(kwargs.values()), None)
        if not is_watching() or not is_dense(query):
            return None
        listeners = {
            name: self.listen(matrix, owner, query)
            for name, (matrix, owner) in self.products.items()
        }
        if not any(listeners.values()):
            return None

        def watch(name: str, x: Tensor, output: Tensor) -> Tensor:
            listener = listeners.get(name)
            if listener is None:
                return output
            return _Watched.apply(
                output,
                x.detach(),
                lambda x, g: listener(x.transpose(0, 1), g.transpose(0, 1)),
                functools.partial(self.refuse, self.products[name][0]),
            )

        return attention.listened(args, kwargs, watch, self.run)


def unseen_reason() -> str:
    """Why a weight may get a gradient though its module was not seen to be called.

    For hooks that are registered now: what ``torch.compile`` made before runs on without them.
    """
    otherwise = "the weight is used without its module being called"
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is None or not dynamo.counters["frames"].get("ok", 0):
        return otherwise
    return (
        "the model was compiled and called before the optimizer was made, and runs without its "
        "hooks (make the optimizer first, or call torch.compiler.reset() before that), or "
        f"{otherwise}"
    )
