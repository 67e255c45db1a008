"""The torch.optim shell shared by the Kronecker-factored methods.

It decides which parameters are preconditioned, captures their statistics, trains all others with
AdamW, bounds the step, and keeps state as plain tensors keyed to the parameter. A method fills in
what it stores and how it turns statistics into a preconditioned gradient.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from singd import checkpoint, cuda_graph, distributed
from singd._layer import flatten_rows, piece_size, square_sums
from singd.amp import calling_scale
from singd.capture import Form, Statistics, Unit
from singd.factors import Job
from singd.grouping import Members, Products
from singd.loss_scale import LossCheck
from singd.options import Group, keep_peak
from singd.plan import Plan, make_plan
from singd.split import KRONECKER, SplitOptimizer
from singd.stepping import Step
from structured import Diagonal, Operator, StructuredMatrix


class KroneckerOptimizer(SplitOptimizer):
    """Base of :class:`singd.SINGD` and :class:`singd.KFAC`.

    Every parameter group given is split by rule: the weights (with biases) of supported layers are
    preconditioned, all other parameters are trained by AdamW with the options ``adamw``. The key
    ``"rule"`` of a group says which. ``lr`` and ``weight_decay`` of a group are those of its
    preconditioned part; a group that has none gives them to AdamW.

    Args:
        model: The model whose layers are hooked.
        params: Parameters or parameter groups, as for any optimizer; all trainable parameters of
            ``model`` if ``None``.
        defaults: Options of the preconditioned groups.
        adamw: Options of :class:`torch.optim.AdamW` for all other parameters; ``lr=3e-3`` unless
            given.
        layers: Types among :data:`singd.layers.OPTIONAL` that are preconditioned as well; or "all".
        max_skipped: Steps in a row that may be skipped since something was not finite; ``None``
            looks for nothing. On a GPU it is known one step later, so that nothing waits.
        telemetry: Called after every step with norms, the bound, residuals and skipped steps.
        process_group: Of the ranks that share the data, if not all do. Statistics are summed over
            it, and gradients averaged unless ``model`` is wrapped in DistributedDataParallel.
    """

    _identity: tuple[str, ...] = ("structures",)  # options that a checkpoint must share
    _sides = ("K", "C")  # members with the structure of the statistics

    # What a method fills in ---------------------------------------------------------------------

    @abstractmethod
    def _statistic(self, unit: Unit, side: str, X: Tensor, part: int) -> StructuredMatrix:
        """What to sum of the columns ``X [..., n, R]``; ``side`` is ``"K"`` or ``"C"``.

        What has another form than S is said in ``unit.forms[side]``.
        """

    def _form(self, unit: Unit, side: str) -> Form:
        """What is summed of a side as far as the options say: the same on every rank."""
        return "S"

    @abstractmethod
    def _update(self, group: Group, jobs: Iterable[Job]) -> Iterator[Members]:
        """New values of what is stored, from the statistics of the Kronecker factors.

        Args:
            group: Of the parameters.
            jobs: All that are due in the group; each holds sums until it is taken.
        """

    def _products(self, group: Group, members: Members) -> Products:
        """Products worth keeping until the next update."""
        return {}

    def _pair(self, members: Members, products: Products) -> tuple[Operator, Operator] | None:
        """``K K^T`` and ``C C^T`` where they are at hand, in one precision."""
        return None

    @abstractmethod
    def _precondition(self, members: Members, products: Products, G: Tensor) -> Tensor:
        """The preconditioned gradient, a new tensor, for ``G [..., d_out, d_in]``."""

    def plan(self) -> Plan:
        """Which rule trains each parameter of the model, and what it stores.

        Nothing is allocated: the model may be on the meta device.
        """
        return make_plan(self)

    # Statistics ---------------------------------------------------------------------------------

    def _due(self, unit: Unit) -> bool:
        """Whether the next step updates the unit's factors."""
        due: bool = unit.group["step"] % unit.group["T"] == 0
        return due

    def _wanted(self, unit: Unit) -> bool:
        """Whether a pass that begins now is captured for the unit."""
        off = self._passes.paused or self._passes.sampled or self._is_foreign(unit)
        return self._due(unit) and not off

    def _measure(
        self, unit: Unit, module: nn.Module, x: Tensor, g: Tensor, part: int, root: int
    ) -> None:
        """Take in one use of ``module`` with input ``x`` and output gradient ``g``."""
        weight = getattr(module, unit.layer.weight, None)
        if unit.layout != self._layout(unit) or weight is not unit.weight:
            self._settle()
        _ = self._buckets  # the factors exist from now on
        K = unit.members[self._sides[0]]
        # Pieces as large as the factor: a product with fewer rows than columns is slow.
        size = max(piece_size(x.device), sum(t.nbytes for t in K.tensors()))
        whole = isinstance(K, Diagonal)
        pieces = [(x, g)] if whole else list(unit.layer.pieces(module, x, g, size))
        unit.whole = len(pieces) == 1
        each = (self._statistics(unit, module, *piece, part) for piece in pieces)
        seen = next(each)
        for other in each:
            seen.add(other)
        self._passes.came()
        unit.observe(module, part, root, seen, x, g)

    def _statistics(
        self, unit: Unit, module: nn.Module, x: Tensor, g: Tensor, part: int
    ) -> Statistics:
        approximation, layer = unit.group["kfac_approx"], unit.layer
        grads, ones = layer.grads(module, g), unit.bias is not None
        K, C = (unit.members[side] for side in self._sides)
        if isinstance(K, Diagonal):
            squares, rows = layer.square_sums(module, x, approximation, ones)
            U_K: StructuredMatrix = Diagonal(squares)
        else:
            A, rows = layer.columns(module, x, approximation, ones)
            U_K = self._statistic(unit, "K", A, part)
        if isinstance(C, Diagonal):
            U_C: StructuredMatrix = Diagonal(square_sums(grads, approximation, average=False))
        else:
            B = flatten_rows(grads, approximation, average=False)
            U_C = self._statistic(unit, "C", B, part)
        samples, positions = grads.shape[-3:-1]
        return Statistics(U_K, U_C, rows, samples, samples * positions)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within this context forward passes are not captured."""
        before, self._passes.paused = self._passes.paused, True
        try:
            yield
        finally:
            self._passes.paused = before

    def count_terms(self, terms: float | Tensor) -> None:
        """Say how many terms the loss of this backward pass is a mean over.

        For means over a number that the layers cannot know, such as the tokens that are not
        padding. Counts add up over backward passes, and replace those of ``loss_average`` at the
        coming step. ``zero_grad`` may come between the count and its backward pass.

        Args:
            terms: The number; a tensor costs no wait for the device.
        """
        stale = (bool(u.statistics) and u.weight.grad is None for u in self._units)
        if not self._passes.sampled and any(stale):
            self._forget()  # of gradients that the model, or a GradScaler's user, has reset
        self._passes.count(terms)

    def close(self) -> None:
        """Remove every hook from the model."""
        self._capture.close()
        if self._loss_check is not None:
            self._loss_check.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def curvature(self) -> Iterator[None]:
        """Within this context backward passes feed the curvature alone.

        For the true Fisher: sample labels from the model's output and call ``backward`` on the loss
        of them in here. Gradients are as before when it ends, and until the next step no other pass
        is captured.
        """
        self._forget()
        saved = [(p, p.grad) for group in self.param_groups for p in group["params"]]
        for p, _ in saved:
            p.grad = None
        self._passes.sampled = False
        try:
            yield
        finally:
            self._passes.sampled = True
            for p, grad in saved:
                p.grad = grad

    # The step -----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update factors that are due, then every parameter that has a gradient.

        If a gradient or a statistic is not finite, nothing is changed, and the step is counted in
        ``self.skipped``. On a GPU that is known at the next step, or when ``skipped`` is asked for.

        Args:
            closure: Evaluates the loss and its gradients; optional.

        Returns:
            The loss, if a closure was given.

        Raises:
            FloatingPointError: If ``max_skipped`` steps in a row were skipped.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._run(descend=True)
        return loss

    @torch.no_grad()
    def precondition(self, scale: float | Tensor | None = None) -> None:
        """Replace every gradient of a preconditioned layer by the preconditioned one, bounded.

        Factors that are due are updated. The step of any other optimizer may follow: then this one
        is only its preconditioner.

        Args:
            scale: By which a GradScaler multiplied the loss; the gradients are to be unscaled.
        """
        self._run(descend=False, scale=None if scale is None else torch.as_tensor(scale))

    def _run(self, *, descend: bool, scale: Tensor | None = None) -> None:
        if cuda_graph.capturing():
            cuda_graph.check(self)
        else:
            self._verdict.settle(self.param_groups)
        scale = calling_scale() if scale is None else scale
        self._settle()
        if checkpoint.wants_state(self):
            checkpoint.make_state(self)
            return
        if distributed.size(self._process_group) > 1:
            distributed.agree(self)
        if self._loss_check is not None:
            self._check_loss(self._loss_check, scale)
        behind = self._behind()
        step, verdict = Step(self, scale), self._verdict
        bad = step.run(descend=descend)
        self._forget()
        counted = []
        for place, group in enumerate(self.param_groups):
            if bad is None and group["rule"] == KRONECKER:
                keep_peak(group)
                if id(group) not in behind:
                    group["step"] += 1
                    counted.append(place)
        if step.ok is None:
            verdict.count(taken=bad is None)
        else:
            verdict.hold(step.ok, counted)
        if self.telemetry is not None and step.report is not None:
            self.telemetry({"skipped": verdict.skipped, **step.report})
        if self.max_skipped is not None and verdict.in_row >= self.max_skipped > 0:
            raise FloatingPointError(
                f"{bad}: gradient, statistics or factors not finite in {verdict.in_row} steps in "
                "a row"
            )

    def _behind(self) -> set[int]:
        """Groups, by id, whose update is due and must wait for the next pass.

        The step that was due was skipped, and the pass under way began before that was known: it
        was not captured, or not from its start. The step to come does not count for such groups.
        """
        late, self._verdict.late = self._verdict.late, False
        if not late:
            return set()
        alone = distributed.size(self._process_group) == 1  # else ranks might not agree
        missed = [u for u in self._units if self._due(u) and (u.passed_by or not alone)]
        behind = {id(u.group) for u in missed if u.group["T"] > 1}  # else all passes are captured
        for unit in self._units:
            if id(unit.group) in behind:
                unit.discard()
        return behind

    @property
    def skipped(self) -> int:
        """Steps that were skipped so far; waits for the last one where that is not known yet."""
        self._verdict.settle(self.param_groups)
        return self._verdict.skipped

    def _check_loss(self, check: LossCheck, scale: Tensor | None) -> None:
        """Warn at the first step if ``loss_average`` is plainly wrong."""
        terms = self._passes.terms
        if isinstance(terms, Tensor) or terms:
            check.close()  # the number is given
        groups = [group for group in self.param_groups if group["rule"] == KRONECKER]
        check.report({group["loss_average"] for group in groups}, scale)
        if not check.handles:
            self._loss_check = None

    def _forget(self) -> None:
        """Drop the statistics of the step that ended."""
        self._passes.end()
        self._passes.sampled = False
        for unit in self._units:
            unit.discard()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients, and forget the statistics that came with them.

        What was collected under :meth:`curvature` stays: those gradients were never there.
        """
        if not self._passes.sampled:
            self._passes.reset()
            for unit in self._units:
                unit.discard()
        super().zero_grad(set_to_none)

    # Checkpoints --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """State and options as plain tensors, numbers and strings.

        ``torch.load`` restores it with its default ``weights_only=True``. Structures appear as
        specs; an option that is a function is left out, and kept by the optimizer that loads.
        """
        self._verdict.settle(self.param_groups)
        return checkpoint.pack(super().state_dict(), self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state. ``state_dict`` is neither changed nor shared; dtypes are kept.

        Raises:
            ValueError: If the state is of another model, method or structure. Nothing is changed.
        """
        self._verdict.settle(self.param_groups)
        checkpoint.load(self, state_dict)
        self._bind()
        for unit in self._units:
            if unit.is_of_its_factors:
                unit.discard()  # those were other factors
