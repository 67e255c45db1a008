"""Hooks that belong to a module, but not to its copies: pickles and copies leave them out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn

CLOSE = (
    "a model whose layers are watched by an optimizer of singd is traced with gradients: use "
    "torch.no_grad(), or optimizer.close() first"
)

_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)


class Hook:
    """A hook that is an object."""

    @property
    def __name__(self) -> str:
        """Asked for by :func:`torch.jit.script` alone, which cannot compile a hook."""
        raise AttributeError(
            "torch.jit.script cannot compile a model whose layers are watched by an optimizer of "
            "singd: call optimizer.close() first"
        )


def attach_after(module: nn.Module, hook: Callable[..., Any], *, first: bool = False) -> Any:
    """Register a transient forward hook, which may run before others; returns its handle.

    The hook is a function of module, arguments, keyword arguments and output.
    """
    handle = module.register_forward_hook(hook, with_kwargs=True, prepend=first)
    return _transient(module, handle)


def attach_before(module: nn.Module, hook: Callable[..., Any]) -> Any:
    """Register a transient forward pre-hook, of module and arguments; returns its handle."""
    return _transient(module, module.register_forward_pre_hook(hook, with_kwargs=True))


def _transient(module: nn.Module, handle: Any) -> Any:
    """Leave a hook out of the state that :mod:`pickle` and :mod:`copy` ask an object for."""
    state = vars(module).get("__getstate__")
    if not isinstance(state, _State):
        state = vars(module)["__getstate__"] = _State(module)
    state.ids.add(handle.id)
    return handle


class _State:
    """``__getstate__`` of a module, without transient hooks; an attribute of the instance."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.ids: set[int] = set()

    def __call__(self) -> Any:
        state = type(self.module).__getstate__(self.module)
        if not isinstance(state, dict):
            return state
        state = {key: value for key, value in state.items() if key != "__getstate__"}
        for name in _HOOKS:
            if name in state:
                left = [(k, hook) for k, hook in state[name].items() if k not in self.ids]
                state[name] = OrderedDict(left)
        return state


def once_filled(module: nn.Module, function: Callable[[], None]) -> None:
    """Call a function once a module has its contents: now, or when a copy of it gets them.

    A module that holds its optimizer is copied and unpickled after it: it is empty until then.
    """
    if "_modules" in vars(module):
        function()
        return

    def setstate(state: Any) -> None:
        vars(module).pop("__setstate__", None)
        before(state)
        function()

    before = module.__setstate__  # that of its class, or of another optimizer's
    vars(module)["__setstate__"] = setstate
