"""What passed through one weight since the last step, pass by pass, until it counts.

What a backward pass sees becomes part of the statistics when the pass adds to ``weight.grad``;
``torch.autograd.grad`` for another purpose leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from singd.capture.samples import Call
from singd.capture.statistics import KroneckerStatistics
from singd.capture.verification import Probes, Verification
from singd.capture.weight_matrix import WeightMatrix
from singd.ops.dtensor import local
from singd.ops.parts import Part


def summed(sums: KroneckerStatistics | None, more: KroneckerStatistics) -> KroneckerStatistics:
    """``sums`` with more rows included, in place; ``more`` itself if there are none yet."""
    if sums is None:
        return more
    sums.add_(more)
    return sums


@dataclass
class Use:
    """The counts of one use of a module."""

    call: Call
    samples: int  # of the layer: its first dimension
    rows: int  # of its output
    flat: bool  # whether the input was a matrix of rows

    def counts(self) -> tuple[int, int]:
        """Samples of the model, and terms of a loss over its samples and positions.

        A layer that was called with some of the rows, as an expert is, counts those of others too.
        """
        samples = self.call.samples
        if samples is None:
            return self.samples, self.rows
        partial = self.flat and self.rows not in (samples, self.call.rows)
        return samples, max(self.call.rows, samples) if partial else self.rows


@dataclass
class Pass:
    """What a backward pass saw of a weight, until it reaches the weight."""

    root: int  # the pass around it, where reentrant checkpointing started it; or itself
    probes: Probes | None = None
    statistics: KroneckerStatistics | None = None
    uses: list[Use] = field(default_factory=list)

    def add(
        self, module: nn.Module, x: Tensor, g: Tensor, statistics: KroneckerStatistics, use: Use
    ) -> None:
        """Hold what one use contributed, until the pass is committed."""
        if self.probes is not None:
            self.probes.include(module, x, g)
        self.statistics = summed(self.statistics, statistics)
        self.uses.append(use)


class Accumulator:
    """What was seen of one weight since the last step.

    What a pass saw is held once it has added to the gradient that autograd makes, and counts once
    that gradient is in ``weight.grad``. Both are one, unless the weight is sharded: then its module
    has another parameter during a pass, and gradients of several passes may be reduced together.

    Args:
        matrix: Weight that is watched.
        unseen: What a gradient without a call of the module means.
    """

    def __init__(self, matrix: WeightMatrix, unseen: str) -> None:
        self.matrix = matrix
        self._unseen = unseen
        self.verification = Verification()
        self.met: nn.Parameter | None = None  # that other parameter
        self._sum: KroneckerStatistics | None = None
        self._held: KroneckerStatistics | None = None
        self._is_reduced = False  # whether the gradient of what is held is in weight.grad
        self.last_call = -1  # number of the step before which the module was last called
        self.keeps_last = False  # the last pass stands for all
        self._unread = (0, 0)  # samples and loss terms of passes that cannot be the last
        self._last = -1, 1.0  # the root of the last pass, and how many of it there were
        self.is_awaited = False  # a forward pass since the last step was to be captured
        self.was_ignored = False  # a forward pass since the last step was not to be captured
        self._pending: dict[int, Pass] = {}
        self._interrupted: set[int] = set()  # passes that others began in, or that failed
        self._counted: dict[int, tuple[int, int]] = {}  # samples and loss terms by root pass

    def begin(self, root: int, part: Part | None, *, verify: bool) -> Pass:
        """The pass under way, which may be new; one that does not count, if it was interrupted.

        Args:
            root: The pass that started this one, or itself.
            part: The inputs or output gradients that this rank sees, if not all.
            verify: Whether the pass may be verified.
        """
        current = torch._C._current_graph_task_id()
        if current in self._interrupted:
            return Pass(root)
        known = self._pending.get(current)
        if known is None:
            others = [key for key, p in list(self._pending.items()) if p.root != root]
            self._interrupted.update(others)
            for key in others:
                self._pending.pop(key, None)
            if self.total is not None and self.matrix.weight.grad is None:
                self._sum = None  # of gradients that were reset by other means than zero_grad
            weight = self.matrix.weight if self.met is None else self.met
            is_due = verify and self.verification.is_due()
            probes = Probes(self.matrix, weight, part) if is_due else None
            self._pending[current] = known = Pass(root, probes)
        return known

    def commit(self, step: int, weight: Tensor) -> None:
        """The pass has added to the gradient that autograd makes: what it saw is held."""
        current = torch._C._current_graph_task_id()
        done = self._pending.pop(current, None)
        if done is None:
            if current not in self._interrupted and self._is_used_otherwise(step, weight):
                self.verification.refuse(self._unseen)
            return
        if done.statistics is not None:
            self.verification.conclude(done.probes)
        elif not done.uses:
            return
        counts = [use.counts() for use in done.uses]
        before = self._counted.get(done.root, (0, 0))
        after = max(before[0], *(n for n, _ in counts)), max(before[1], *(n for _, n in counts))
        self._counted[done.root] = after
        samples, loss_terms = (new - old for new, old in zip(after, before, strict=True))
        if done.statistics is None:
            self._unread = self._unread[0] + samples, self._unread[1] + loss_terms
            return
        done.statistics.samples, done.statistics.loss_terms = samples, loss_terms
        self._add_held()
        if self.keeps_last:
            self._extend(done.statistics, done.root)
        self._held = summed(self._held, done.statistics)

    def _extend(self, one: KroneckerStatistics, root: int) -> None:
        """Let the last pass stand for all samples since the last step."""
        if root != self._last[0]:
            earlier = [s for s in (self._sum, self._held) if s is not None]
            before = self._unread[0] + sum(s.samples for s in earlier)
            self._last = root, (before + one.samples) / max(one.samples, 1)
            one.is_last = True
        one.stand_for_(self._last[1])
        one.samples, one.loss_terms = (
            one.samples + self._unread[0],
            one.loss_terms + self._unread[1],
        )
        self._unread = 0, 0

    def reduce(self) -> None:
        """The gradient of all passes so far is in ``weight.grad``: what they saw counts.

        It is added up later: this may be called on another stream of the device.
        """
        self._is_reduced = True

    def deliver(
        self,
        send: Callable[[WeightMatrix, KroneckerStatistics], KroneckerStatistics],
        empty: Callable[[WeightMatrix], KroneckerStatistics],
    ) -> None:
        """The gradient of all passes so far is in ``weight.grad``: send what they saw at once.

        Args:
            send: Adds statistics up over ranks.
            empty: Makes statistics of no rows.
        """
        before = self._sum if self._sum is not None and self._sum.is_summed else None
        self._sum = None if before is not None else self._sum
        self._is_reduced = True
        one = self.total or empty(self.matrix)
        one.is_last = self.keeps_last
        self._sum = None
        self._sum = summed(before, send(self.matrix, one))

    @property
    def is_unseen(self) -> bool | None:
        """Whether there is a gradient that no pass brought, though all were to be captured.

        ``None`` if nothing is known on this rank: its module was not called, or has no gradient.
        """
        if self.was_ignored or self.is_unread or self.total is not None:
            return False
        grad = self.matrix.weight.grad
        called = self.is_awaited or self.last_call < 0
        return True if called and grad is not None and self._is_nonzero(grad) else None

    @property
    def is_unread(self) -> bool:
        """Whether there were passes that cannot be the last, and none since that can be."""
        return any(self._unread)

    @property
    def total(self) -> KroneckerStatistics | None:
        """What counts."""
        self._add_held()
        return self._sum

    def _add_held(self) -> None:
        if self._is_reduced and self._held is not None:
            self._sum, self._held = summed(self._sum, self._held), None
        self._is_reduced = False

    def _is_used_otherwise(self, step: int, weight: Tensor) -> bool:
        """Whether a pass without a trace shows that the weight is used in another way.

        Not if a forward pass was not to be captured, lately or when the graph was made, nor if the
        gradient is zero: sums of all parameters times zero are added to losses.
        """
        if self.was_ignored if self.verification.explained is None else step - self.last_call <= 1:
            return False
        return weight.grad is None or self._is_nonzero(weight.grad)

    def _is_nonzero(self, grad: Tensor) -> bool:
        """Whether this rank has a part of the matrix's gradient that is not zero."""
        return bool(local(self.matrix.part(grad)).any())

    def discard(self, *, held: bool = False) -> None:
        """Forget what counts, and passes under way.

        Args:
            held: Forget what is held too, though its gradients are yet to be reduced.
        """
        self._add_held()
        if held:
            self._held, self.is_awaited = None, False
        if held or self.met is None:
            self._unread = 0, 0
        self._sum = None
        self._pending.clear()
        self._interrupted.clear()
        self._counted.clear()
        self._last = -1, 1.0

    def end_step(self) -> None:
        """Forget what was for a step that is over, and which forward passes were before it."""
        self.discard()
        self.is_awaited = self.was_ignored = False
