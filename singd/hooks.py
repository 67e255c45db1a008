"""Hooks that let a unit see what its layer is used for, forwards and backwards.

The output of a hooked layer passes through :class:`_Tap`, an identity that saves the layer's input
the way autograd does. So the input is shared with autograd, freed with it, recomputed under
activation checkpointing, and there again for a second backward. In-place activations may follow.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from singd.attention import listened, unwrap, uses
from singd.capture import Unit

Listener = Callable[[Tensor, Tensor], None]


class _Tap(torch.autograd.Function):
    """The identity on a layer's output; its backward sees the layer's input and output gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, listen: Listener) -> Tensor:
        ctx.save_for_backward(x)
        ctx.listen = listen
        return output.detach()  # a fresh tensor on the same memory: in-place operations may follow

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        with torch.no_grad():
            ctx.listen(ctx.saved_tensors[0].detach(), g.detach())
        return g, None, None


class Capture:
    """The hooks on a model's layers; they do not keep alive whom they report to.

    Args:
        wanted: A method that says whether a unit's next statistics will be used.
        measure: A method called in the backward pass with a unit, the module of it that was used,
            an input, an output gradient, the part of the layer, and the pass.
    """

    def __init__(self, wanted: Callable[[Unit], bool], measure: Callable[..., None]) -> None:
        self.wanted, self.measure = weakref.WeakMethod(wanted), weakref.WeakMethod(measure)
        self.handles: list[Any] = []
        self.roots: dict[int, int] = {}  # the pass that a pass was started in

    def watch(self, model: nn.Module, units: Iterable[Unit]) -> None:
        """Hook the layers of ``units``, all in ``model``."""
        mine = {id(unit.weight): unit for unit in units}
        for unit in mine.values():
            hook = _Hook(self, unit)
            for module in unit.modules:
                if not isinstance(module, nn.MultiheadAttention):
                    self.handles.append(module.register_forward_hook(hook, with_kwargs=True))
            trained = unit.weight.requires_grad
            unit.weight.requires_grad_()  # a frozen weight takes no hook, but may thaw
            self.handles.append(unit.weight.register_post_accumulate_grad_hook(unit.commit))
            unit.weight.requires_grad_(trained)
        for module in model.modules():
            if isinstance(module, nn.MultiheadAttention):
                products = uses(module).items()
                found = {name: (mine[i], m, part) for name, (i, m, part) in products if i in mine}
                if found:
                    self.handles += _AttentionHook(self, found).attach(module)

    def close(self) -> None:
        """Remove every hook."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def listener(self, unit: Unit, module: nn.Module, part: int = 0) -> Listener | None:
        """What to call in the backward pass of a use of ``module`` that begins, if anything."""
        wanted = self.wanted()
        if wanted is None or not (torch.is_grad_enabled() and unit.weight.requires_grad):
            return None
        if torch._C._are_functorch_transforms_active():
            return None
        unit.called = unit.group["step"]
        if not wanted(unit):
            unit.passed_by = True
            return None
        made_in = torch._C._current_graph_task_id()

        def listen(x: Tensor, g: Tensor) -> None:
            measure = self.measure()
            if measure is not None:
                measure(unit, module, x, g, part, self._root(made_in))

        return listen

    def _root(self, made_in: int) -> int:
        """The pass under way. One that reentrant checkpointing starts belongs to that around it.

        Args:
            made_in: The pass in which the forward was recomputed; -1 if it was not.
        """
        current: int = torch._C._current_graph_task_id()
        if made_in == -1:
            self.roots.clear()
            return current
        self.roots[current] = self.roots.get(made_in, made_in)
        return self.roots[current]


class _Hook:
    """The forward hook of a unit. Where a module is copied or pickled, it becomes an idle one."""

    def __init__(self, capture: Capture | None = None, unit: Unit | None = None) -> None:
        self.capture, self.unit = capture, unit

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()

    @torch.compiler.disable
    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor | None:
        if self.capture is None or self.unit is None:
            return None
        listen = self.capture.listener(self.unit, module)
        if listen is None:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        tapped: Tensor = _Tap.apply(output, x, listen)
        return tapped


class _AttentionHook:
    """The hooks of an attention module, whose projections run without calling a module.

    Args:
        capture: Where the uses are reported.
        products: The unit, module and part of every projection that is watched, by its name.
    """

    def __init__(
        self,
        capture: Capture | None = None,
        products: dict[str, tuple[Unit, nn.Module, int]] | None = None,
    ) -> None:
        self.capture, self.products = capture, products or {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _AttentionHook, ()

    def attach(self, module: nn.Module) -> Iterator[Any]:
        """Register before and after the module's forward."""
        yield module.register_forward_pre_hook(self, with_kwargs=True)
        yield module.register_forward_hook(unwrap)

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.capture is None:
            return None
        listeners = {name: self.capture.listener(*use) for name, use in self.products.items()}
        if not any(listeners.values()):
            return None

        def tap(name: str, x: Tensor, output: Tensor) -> Tensor:
            listen = listeners.get(name)
            if listen is None:
                return output
            tapped: Tensor = _Tap.apply(
                output, x, lambda x, g: listen(x.transpose(0, 1), g.transpose(0, 1))
            )
            return tapped

        return listened(args, kwargs, tap)
