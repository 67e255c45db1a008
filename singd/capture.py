"""Capture: hooks that turn forward and backward passes into statistics.

The output of a hooked layer passes through :class:`_Tap`, an identity that saves the layer's input
the way autograd does. So the input is shared with autograd, freed with it, recomputed under
activation checkpointing, and there again for a second backward. In-place activations may follow.

What a backward pass sees becomes part of the statistics when the pass adds to ``weight.grad``;
``torch.autograd.grad`` for another purpose leaves no trace. The first pass is checked: if what the
hooks saw does not explain the gradient (the weight is also used in another way), the unit is
``unexplained`` and must not be preconditioned.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from singd._layer import Layer
from structured import Structure, StructuredMatrix

_PROBES = 8


@dataclass
class Statistics:
    """Sums over rows, with counts; normalised once, at the step."""

    U_K: StructuredMatrix  # of the inputs
    U_C: StructuredMatrix  # of the output gradients
    rows: int  # R, of inputs
    samples: int  # N
    terms: int  # N P, counting every shared position of a sample

    def add(self, other: Statistics) -> None:
        """Include another backward pass."""
        self._sum(other)
        self.samples += other.samples
        self.terms += other.terms

    def reuse(self, other: Statistics) -> None:
        """Include another use of the layer in the same pass: more rows, the same samples."""
        self._sum(other)
        self.samples = max(self.samples, other.samples)
        self.terms = max(self.terms, other.terms)

    def _sum(self, other: Statistics) -> None:
        self.U_K, self.U_C = self.U_K + other.U_K, self.U_C + other.U_C
        self.rows += other.rows


@dataclass(eq=False)
class Unit:
    """A weight matrix that is preconditioned, its layer, and what was seen of it."""

    name: str  # of the weight, in the model
    modules: list[nn.Module]  # more than one if they share the weight
    layer: Layer
    weight: nn.Parameter
    bias: nn.Parameter | None
    group: dict[str, Any] = field(default_factory=dict)  # the parameter group of the weight
    structures: tuple[Structure, ...] = ()
    layout: tuple[Any, ...] = ()  # what the factors were made for
    members: dict[str, StructuredMatrix] = field(default_factory=dict)  # its factors, by name
    statistics: Statistics | None = None
    pending: Statistics | None = None  # of the pass under way
    pass_id: int = -1
    passed_by: bool = False  # a forward since the last step was not wanted
    explained: bool | None = None  # whether the first pass explained the gradient
    probes: tuple[Tensor, Tensor] | None = None  # of the gradient: before the pass, seen in it

    @property
    def module(self) -> nn.Module:
        """The layer, or the first of those that share the weight."""
        return self.modules[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """``(..., d_out, d_in)``, the bias counted as one more input."""
        *batch, d_out, d_in = self.layer.shape(self.module)
        return (*batch, d_out, d_in + (self.bias is not None))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Weight and bias, if there is one."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def split(self, matrix: Tensor) -> list[Tensor]:
        """A matrix ``[..., d_out, d_in]`` as views shaped like :attr:`parameters`."""
        if self.bias is None:
            return [self.layer.from_matrix(self.module, matrix)]
        weight = self.layer.from_matrix(self.module, matrix[..., :-1])
        return [weight, matrix[..., -1].reshape(self.bias.shape)]

    # What is seen -------------------------------------------------------------------------------

    def observe(self, module: nn.Module, seen: Statistics, x: Tensor, g: Tensor) -> None:
        """Hold what one use of ``module`` contributed until the pass reaches the weight."""
        current = torch._C._current_graph_task_id()
        again = self.pending is not None and self.pass_id == current
        if self.explained is None:
            *_, d_out, d_in = self.layer.shape(module)
            u, v = _directions(d_in, g.device), _directions(d_out, g.device)
            explained = self.layer.contract(module, x, g, u, v)
            if again and self.probes is not None:
                self.probes = (self.probes[0], self.probes[1] + explained)
            else:
                self.probes = (self._probe_gradient(), explained)
        if again and self.pending is not None:
            self.pending.reuse(seen)
        else:
            self.pending, self.pass_id = seen, current
            if self.weight.grad is None:
                self.statistics = None  # of gradients that were reset behind our back

    def commit(self, _: Tensor | None = None) -> None:
        """The pass has added to ``weight.grad``: what it saw counts."""
        if self.pending is None or self.pass_id != torch._C._current_graph_task_id():
            if not self.passed_by and self.explained is None:
                self.explained = False
            return
        if self.explained is None and self.probes is not None:
            before, seen = self.probes
            self.explained = _parallel(self._probe_gradient().to(seen) - before.to(seen), seen)
            self.probes = None
        if self.statistics is None:
            self.statistics = self.pending
        else:
            self.statistics.add(self.pending)
        self.pending = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies: without what was seen, and what :meth:`singd.SINGD` finds again."""
        fresh = {"statistics": None, "pending": None, "probes": None, "structures": ()}
        return vars(self) | fresh | {"members": {}, "layout": ()}

    def discard(self) -> None:
        """Forget what was seen since the last step."""
        self.statistics = self.pending = self.probes = None
        self.passed_by = False

    def _probe_gradient(self) -> Tensor:
        """``v^T G u`` for a few random ``u`` and ``v``, of ``weight.grad``, ``[..., probes]``."""
        grad = self.weight.grad
        *batch, d_out, d_in = self.layer.shape(self.module)
        if grad is None:
            return torch.zeros(*batch, _PROBES, device=self.weight.device)
        u, v = _directions(d_in, grad.device), _directions(d_out, grad.device)
        return ((self.layer.to_matrix(self.module, grad).to(u) @ u) * v).sum(-2)


def _directions(n: int, device: torch.device) -> Tensor:
    """Random directions ``[n, probes]``, always the same."""
    return torch.randn(n, _PROBES, generator=torch.Generator().manual_seed(n)).to(device)


def _parallel(gradient: Tensor, seen: Tensor) -> bool | None:
    """Whether the two agree but for a positive factor (of a gradient scaler, of averaging).

    ``None`` where that cannot be told: both are zero, or one is not finite.
    """
    gradient, seen = gradient.flatten().double(), seen.flatten().double()
    norms = gradient.norm() + seen.norm()
    if not bool(norms.isfinite()) or not bool(norms):
        return None
    return bool(gradient @ seen >= 0.99 * gradient.norm() * seen.norm())


class _Tap(torch.autograd.Function):
    """The identity on a layer's output; its backward sees the layer's input and output gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, seen: Callable[..., None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.seen = seen
        return output.detach()  # a fresh tensor on the same memory: in-place operations may follow

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        with torch.no_grad():
            ctx.seen(ctx.saved_tensors[0].detach(), g.detach())
        return g, None, None


class Capture:
    """The hooks on a model's layers; they do not keep alive whom they report to.

    Args:
        wanted: A method that says whether a unit's next statistics will be used.
        measure: A method called in the backward pass with a unit, the module of it that was used,
            an input and an output gradient.
    """

    def __init__(
        self,
        wanted: Callable[[Unit], bool],
        measure: Callable[[Unit, nn.Module, Tensor, Tensor], None],
    ) -> None:
        self.wanted, self.measure = weakref.WeakMethod(wanted), weakref.WeakMethod(measure)
        self.handles: list[Any] = []

    def watch(self, units: Iterable[Unit]) -> None:
        """Hook the layers of ``units``."""
        for unit in units:
            hook = _Hook(self, unit)
            for module in unit.modules:
                self.handles.append(module.register_forward_hook(hook, with_kwargs=True))
            trained = unit.weight.requires_grad
            unit.weight.requires_grad_()  # a frozen weight takes no hook, but may thaw
            self.handles.append(unit.weight.register_post_accumulate_grad_hook(unit.commit))
            unit.weight.requires_grad_(trained)

    def close(self) -> None:
        """Remove every hook."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


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
        unit, wanted, measure = self.unit, self.capture.wanted(), self.capture.measure()
        if wanted is None or measure is None:
            return None
        if not (torch.is_grad_enabled() and unit.weight.requires_grad):
            return None
        if torch._C._are_functorch_transforms_active():
            return None
        if not wanted(unit):
            unit.passed_by = True
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        tapped: Tensor = _Tap.apply(output, x, partial(measure, unit, module))
        return tapped
