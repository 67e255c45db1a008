"""What is seen of a weight: statistics of the passes that train it, and whether they explain it.

What a backward pass sees becomes part of the statistics when the pass adds to ``weight.grad``;
``torch.autograd.grad`` for another purpose leaves no trace. Some passes are checked, the first one
always: if what the hooks saw does not explain the gradient (the weight is also used in another
way), the unit is not ``explained`` and must not be preconditioned.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from singd import cuda_graph
from singd._layer import Layer
from singd.explain import Probes
from structured import Structure, StructuredMatrix

if TYPE_CHECKING:
    from singd.grouping import Bucket

Form = Literal["S", "PS", "H"]
"""What is summed: ``Pi(S)``; ``K K^T S``, where rows are few; or ``Pi(K^T S K)``."""


@dataclass
class Statistics:
    """Sums over rows, with counts; normalised once, at the step."""

    U_K: StructuredMatrix  # of the inputs
    U_C: StructuredMatrix  # of the output gradients
    rows: int  # R, of inputs
    samples: int  # N
    terms: int  # N P, counting every shared position of a sample

    def add(self, other: Statistics, samples: int = 0, terms: int = 0) -> None:
        """Include more rows, of a pass of which some samples and terms are counted already."""
        for mine, more in ((self.U_K, other.U_K), (self.U_C, other.U_C)):
            torch._foreach_add_(mine.tensors(), more.tensors())
        self.rows += other.rows
        self.samples += max(0, other.samples - samples)
        self.terms += max(0, other.terms - terms)


@dataclass
class Pass:
    """What a backward pass saw of a unit, until it reaches the weight."""

    root: int  # the pass around it, where reentrant checkpointing started it; or itself
    seen: dict[int, Statistics] = field(default_factory=dict)  # by part of the layer
    probes: Probes | None = None


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
    bucket: Bucket | None = None  # where they are
    statistics: dict[int, Statistics] = field(default_factory=dict)  # by part of the layer
    passes: dict[int, Pass] = field(default_factory=dict)  # under way
    counted: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)  # by root, part
    forms: dict[str, Form] = field(default_factory=dict)  # by side: what is summed
    whole: bool = True  # whether a use of the layer is seen as one, not in pieces
    called: int = -1  # the step of the last forward pass
    passed_by: bool = False  # a forward since the last step was not wanted
    explained: bool | None = None  # whether what is seen explains the gradient
    committed: int = 0  # passes

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
            return [self.like_weight(matrix)]
        weight = self.like_weight(matrix[..., :-1])
        return [weight, matrix[..., -1].reshape(self.bias.shape)]

    @functools.cached_property
    def is_matrix(self) -> bool:
        """Whether the weight is its own matrix, as most are: to ask its layer takes longer."""
        own = type(self.layer)
        plain = (own.to_matrix, own.from_matrix) == (Layer.to_matrix, Layer.from_matrix)
        return plain and self.layer.shape(self.module) == tuple(self.weight.shape)

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight, or its gradient, as ``[..., d_out, d_in]``."""
        return weight if self.is_matrix else self.layer.to_matrix(self.module, weight)

    def like_weight(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`matrix`."""
        return matrix if self.is_matrix else self.layer.from_matrix(self.module, matrix)

    def member(self, name: str, part: int = 0) -> StructuredMatrix:
        """A factor, of one part of the layer."""
        whole = self.members[name]
        return whole if self.layer.parts == 1 else whole.map(lambda t: t[part])

    # What is seen -------------------------------------------------------------------------------

    def observe(
        self, module: nn.Module, part: int, root: int, seen: Statistics, x: Tensor, g: Tensor
    ) -> None:
        """Hold what one use of ``module`` contributed until the pass reaches the weight."""
        current = torch._C._current_graph_task_id()
        if current not in self.passes:
            self.passes = {k: p for k, p in self.passes.items() if p.root == root}
            if self.weight.grad is None:
                self.statistics = {}  # of gradients that were reset behind our back
            # At the first pass and ever more rarely: that costs nothing on average.
            check = self.explained is None or self.committed & (self.committed - 1) == 0
            check = check and not cuda_graph.capturing()
            probes = Probes(self.layer, self.module, self.weight) if check else None
            self.passes[current] = Pass(root, probes=probes)
        under_way = self.passes[current]
        if under_way.probes is not None:
            under_way.probes.see(module, part, x, g)
        if part in under_way.seen:
            earlier = under_way.seen[part]
            earlier.add(seen, earlier.samples, earlier.terms)
        else:
            under_way.seen[part] = seen

    def commit(self, _: Tensor | None = None) -> None:
        """The pass has added to ``weight.grad``: what it saw counts."""
        done = self.passes.pop(torch._C._current_graph_task_id(), None)
        if done is None:
            if self._used_otherwise():
                self.explained = False
            return
        verdict = None if done.probes is None else done.probes.explain()
        self.explained = self.explained if verdict is None else verdict
        self.committed += 1
        for part, seen in done.seen.items():
            samples, terms = self.counted.get((done.root, part), (0, 0))
            counts = max(samples, seen.samples), max(terms, seen.terms)
            if part in self.statistics:
                self.statistics[part].add(seen, samples, terms)
            else:
                self.statistics[part] = seen
            self.counted[done.root, part] = counts

    def _used_otherwise(self) -> bool:
        """Whether a pass without a trace shows that the weight is used in another way.

        Not if a forward pass was not wanted, lately or when the graph that is used was made.
        """
        if self.explained is None:
            return not self.passed_by
        idle: bool = self.group["step"] - self.called > 1
        return idle

    def __getstate__(self) -> dict[str, Any]:
        """For copies: without what was seen, and what :meth:`singd.SINGD` finds again."""
        fresh: dict[str, Any] = {"statistics": {}, "passes": {}, "counted": {}, "structures": ()}
        return vars(self) | fresh | {"members": {}, "layout": (), "bucket": None, "forms": {}}

    @property
    def is_of_its_factors(self) -> bool:
        """Whether what was summed is of no use with other factors."""
        return any(form != "S" for form in self.forms.values())

    def discard(self) -> None:
        """Forget what was seen since the last step."""
        for seen in (self.statistics, self.passes, self.counted, self.forms):
            seen.clear()
        self.passed_by = False

    @property
    def complete(self) -> bool:
        """Whether rows of every part of the layer were seen since the last step."""
        seen = self.statistics
        return len(seen) == self.layer.parts and all(s.rows for s in seen.values())
