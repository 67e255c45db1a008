"""Capture: hooks that turn forward and backward passes into statistics.

The output of a hooked layer passes through :class:`_Tap`, an identity that saves the layer's input
the way autograd does. So the input is shared with autograd, freed with it, recomputed under
activation checkpointing, and there again for a second backward. In-place activations may follow.

What a backward pass sees becomes part of the statistics when the pass adds to ``weight.grad``;
``torch.autograd.grad`` for another purpose leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from singd.layers import Layer
from structured import StructuredMatrix


@dataclass
class Statistics:
    """Sums over rows, with counts; normalised once, at the step."""

    U_K: StructuredMatrix  # of the inputs
    U_C: StructuredMatrix  # of the output gradients
    rows: int  # R, of inputs
    samples: int  # N
    positions: int  # P, shared positions of a sample

    def add(self, other: Statistics) -> None:
        """Include another backward pass."""
        self._sum(other)
        self.samples += other.samples

    def reuse(self, other: Statistics) -> None:
        """Include another use of the layer in the same pass: more rows, the same samples."""
        self._sum(other)
        self.samples = max(self.samples, other.samples)

    def _sum(self, other: Statistics) -> None:
        self.U_K, self.U_C = self.U_K + other.U_K, self.U_C + other.U_C
        self.rows += other.rows
        self.positions = max(self.positions, other.positions)


@dataclass(eq=False)
class Unit:
    """A weight matrix that is preconditioned, its layer, and what was seen of it."""

    name: str
    modules: list[nn.Module]  # more than one if they share the weight
    layer: Layer
    weight: nn.Parameter
    bias: nn.Parameter | None
    group: dict[str, Any]  # the parameter group of the weight
    statistics: Statistics | None = None
    pending: Statistics | None = None
    pass_id: int = -1
    members: dict[str, StructuredMatrix] = field(default_factory=dict)  # its factors, by name

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

    def join(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Weight and bias (or gradients of them) as one matrix ``[..., d_out, d_in]``."""
        matrix = self.layer.to_matrix(self.module, weight)
        if bias is None:
            return matrix
        return torch.cat([matrix, bias.reshape(*matrix.shape[:-1], 1)], -1)

    def split(self, matrix: Tensor) -> list[Tensor]:
        """The inverse of :meth:`join`, for :attr:`parameters`."""
        if self.bias is None:
            return [self.layer.from_matrix(self.module, matrix)]
        weight = self.layer.from_matrix(self.module, matrix[..., :-1])
        return [weight, matrix[..., -1].reshape(self.bias.shape)]

    def observe(self, seen: Statistics) -> None:
        """Hold what one use of the layer contributed until the pass reaches the weight."""
        current = torch._C._current_graph_task_id()
        if self.pending is not None and self.pass_id == current:
            self.pending.reuse(seen)
        else:
            self.pending, self.pass_id = seen, current

    def commit(self, _: Tensor | None = None) -> None:
        """The pass has added to ``weight.grad``: what it saw counts."""
        if self.pending is None or self.pass_id != torch._C._current_graph_task_id():
            return
        if self.statistics is None:
            self.statistics = self.pending
        else:
            self.statistics.add(self.pending)
        self.pending = None

    def discard(self) -> None:
        """Forget what was seen since the last step."""
        self.statistics = self.pending = None


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
    """The hooks on a model's layers.

    Args:
        wanted: Whether a unit's next statistics will be used.
        measure: Turns a unit, an input and an output gradient into :class:`Statistics`.
    """

    def __init__(
        self,
        wanted: Callable[[Unit], bool],
        measure: Callable[[Unit, Tensor, Tensor], Statistics],
    ) -> None:
        self.wanted, self.measure = wanted, measure
        self.handles: list[Any] = []

    def watch(self, units: Iterable[Unit]) -> None:
        """Hook the layers of ``units``."""
        for unit in units:
            hook = self._forward_hook(unit)
            for module in unit.modules:
                self.handles.append(module.register_forward_hook(hook, with_kwargs=True))
            self.handles.append(unit.weight.register_post_accumulate_grad_hook(unit.commit))

    def _forward_hook(self, unit: Unit) -> Callable[..., Tensor | None]:
        def seen(x: Tensor, g: Tensor) -> None:
            unit.observe(self.measure(unit, x, g))

        @torch.compiler.disable
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> Tensor | None:
            if not (torch.is_grad_enabled() and unit.weight.requires_grad and self.wanted(unit)):
                return None
            if torch._C._are_functorch_transforms_active():
                return None
            x = args[0] if args else next(iter(kwargs.values()))
            tapped: Tensor = _Tap.apply(output, x, seen)
            return tapped

        return hook

    def close(self) -> None:
        """Remove every hook."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
