"""From the passes of a model to statistics: hooks, accumulators, and what holds for all of them."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from singd.capture import attention
from singd.capture.accumulator import Accumulator
from singd.capture.hooks import AttentionHook, LayerHook, Listener, unseen_reason
from singd.capture.loss_count import LossCount
from singd.capture.loss_terms import LossTerms
from singd.capture.observer import Observer
from singd.capture.reading import seen, seen_shape, statistics_of, use_of
from singd.capture.samples import Call, Calls, is_dense
from singd.capture.statistics import (
    KroneckerStatistics,
    NoColumns,
    Side,
    Statistic,
    UnreadableError,
)
from singd.capture.warning import warn_user
from singd.capture.weight_matrix import WeightMatrix
from singd.layers.convolution import Convolution
from singd.ops import cuda_graph
from singd.ops.dtensor import is_distributed
from singd.ops.profiling import scope


class Capture:
    """The hooks on a model's layers and what they saw; the observer is not kept alive."""

    def __init__(self, model: nn.Module, observer: Observer) -> None:
        self._observer = weakref.ref(observer)
        self.accumulators: dict[WeightMatrix, Accumulator] = {}
        self.count = LossCount()
        self.is_paused = False
        self.is_sampled = False  # the statistics are those of curvature()
        self._has_told = False  # of gradients that no backward pass brought
        self.step = 0  # number of steps so far
        self._calls = Calls(model)
        self.loss_terms = LossTerms(model, self._calls)
        self._handles: list[Any] = [*self._calls.handles]
        self._roots: dict[int, int] = {}  # the pass that a pass was started in

    def watch(self, model: nn.Module, matrices: Iterable[WeightMatrix]) -> None:
        """Hook the layers of ``matrices``, all in ``model``."""
        new = list(matrices)
        unseen = unseen_reason()
        self.accumulators |= {matrix: Accumulator(matrix, unseen) for matrix in new}
        for matrix in new:
            if matrix.rows is None and not isinstance(matrix.module, nn.MultiheadAttention):
                self._handles += LayerHook(matrix, self.listen, self.refuse).attach()
            trained = matrix.weight.requires_grad
            matrix.weight.requires_grad_()  # a frozen weight takes no hook, but may thaw
            commit = functools.partial(self.commit, matrix)
            self._handles.append(matrix.weight.register_post_accumulate_grad_hook(commit))
            matrix.weight.requires_grad_(trained)
        found: Any = {(matrix.weight, matrix.label): matrix for matrix in new}
        for module in model.modules():
            if isinstance(module, nn.MultiheadAttention):
                products = {
                    name: (found[weight, label], owner)
                    for name, (weight, label, owner) in attention.projections(module).items()
                    if (weight, label) in found
                }
                if products:
                    hook = AttentionHook(products, self.listen, self.refuse)
                    self._handles += hook.attach(module)

    def close(self) -> None:
        """Remove every hook."""
        self.loss_terms.close()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # Passes -------------------------------------------------------------------------------------

    def listen(self, matrix: WeightMatrix, module: nn.Module, x: Any) -> Listener | None:
        """Who listens to a use of ``module`` that begins, if anybody."""
        observer, accumulator = self._observer(), self.accumulators[matrix]
        if observer is None or not matrix.weight.requires_grad:
            return None
        weight = module._parameters.get(matrix.layer.weight)
        if weight is not None and weight is not matrix.weight:
            if is_distributed(matrix.weight):
                self._meet(accumulator, weight)
            elif weight.is_leaf:  # of a functional call, and not made of the model's
                return None
        call = self._calls.current
        if is_dense(x) and isinstance(module, nn.Linear):
            call.use(x)
        elif is_dense(x) and isinstance(matrix.layer, Convolution):
            call.use_images(x if x.ndim == matrix.weight.ndim else x[None])
        accumulator.last_call = self.step
        made_in = torch._C._current_graph_task_id()
        ignored = self.is_paused or self.is_sampled or not observer.is_captured(matrix)
        if made_in != -1 and accumulator.was_ignored != accumulator.is_awaited:
            ignored = accumulator.was_ignored  # as when it was called, and not recomputed
        if ignored:
            accumulator.was_ignored = True
            return None
        accumulator.is_awaited = True

        def listener(x: Tensor, g: Tensor) -> None:
            self._observe(matrix, module, x, g, call, self._root(made_in))

        return listener

    def _meet(self, accumulator: Accumulator, weight: nn.Parameter) -> None:
        """Watch the parameter that a module has in this pass, as the model's is sharded.

        Gradients of a pass are of it, as long as they are not reduced. It is the same object in
        every pass.
        """
        if weight is not accumulator.met:
            accumulator.met = weight
            commit = functools.partial(self.commit, accumulator.matrix)
            self._handles.append(weight.register_post_accumulate_grad_hook(commit))

    def refuse(self, matrix: WeightMatrix, reason: str) -> None:
        """Leave a weight to AdamW from the next step on."""
        self.accumulators[matrix].verification.refuse(reason)

    def _root(self, made_in: int) -> int:
        """The pass under way. One that reentrant checkpointing starts belongs to that around it.

        Args:
            made_in: The pass in which the forward was recomputed; -1 if it was not.
        """
        current: int = torch._C._current_graph_task_id()
        if made_in == -1:
            self._roots.clear()
            return current
        self._roots[current] = root = self._roots.get(made_in, made_in)
        return root

    def _observe(
        self, matrix: WeightMatrix, module: nn.Module, x: Tensor, g: Tensor, call: Call, root: int
    ) -> None:
        """Take in one use of ``module`` with input ``x`` and output gradient ``g``."""
        observer, accumulator = self._observer(), self.accumulators[matrix]
        if observer is None or accumulator.verification.explained is False:
            return
        with scope("singd::capture"):
            request = observer.request(matrix)
            x, g = seen(x, request.part, "input"), seen(g, request.part, "grad")
            accumulator.keeps_last = request.keeps_last
            verify = request.is_read and not cuda_graph.is_capturing()
            current = accumulator.begin(root, request.part, verify=verify)
            self.count.begin_pass()
            try:
                if request.is_read:
                    current.add(module, x, g, *statistics_of(request, matrix, module, x, g, call))
                else:
                    current.uses.append(use_of(request, matrix, module, x, g, call))
            except UnreadableError as error:
                accumulator.verification.refuse(str(error))

    def commit(self, matrix: WeightMatrix, weight: Tensor) -> None:
        """A backward pass has added to the gradient of ``matrix``.

        ``weight`` has it: the parameter of the model, or that of its module in the pass.
        """
        accumulator = self.accumulators[matrix]
        if weight is not matrix.weight or accumulator.met is None:
            accumulator.commit(self.step, weight)
            self._calls.end()
        if weight is matrix.weight:
            observer = self._observer()
            if observer is not None and accumulator.is_awaited and observer.sends(matrix):
                accumulator.deliver(observer.send, self.empty)
            else:
                accumulator.reduce()

    # Steps --------------------------------------------------------------------------------------

    def collect(self) -> Mapping[WeightMatrix, KroneckerStatistics]:
        """What was seen since the last step, of weights of which any rows were seen.

        Raises:
            ValueError: If only the last pass was to be read, and there was none that could be it.
        """
        found = {
            matrix: a.total
            for matrix, a in self.accumulators.items()
            if a.total is not None and (a.total.rows or a.total.is_summed)
        }
        unread = next((m for m, a in self.accumulators.items() if a.is_unread), None)
        if unread is not None and not found:
            raise ValueError(
                f"{unread.name}: sample='last' reads a backward pass that reduces gradients: "
                "expected the last one before a step outside no_sync(), got none"
            )
        return found

    def unseen(self, matrices: Iterable[WeightMatrix]) -> list[float]:
        """Numbers whose sum over ranks is positive for gradients that no pass on any rank brought.

        ``matrices`` are the same on every rank.
        """
        if self._has_told or torch.compiler.is_compiling():
            return [0.0 for _ in matrices]
        number = {None: 0.0, True: 1.0, False: -float(1 << 32)}
        return [number[self.accumulators[matrix].is_unseen] for matrix in matrices]

    def notice_unseen(self, unseen: Iterable[WeightMatrix]) -> None:
        """Warn once of gradients that no backward pass brought, of these matrices."""
        names = ", ".join(matrix.name for matrix in unseen)
        if names:
            self._has_told = True
            warn_user(
                f"{names}: no backward pass was seen that made the gradient (it was written by "
                "hand, as after torch.autograd.grad, or zero_grad came after the pass): factors "
                "stay as they are"
            )

    def empty(self, matrix: WeightMatrix) -> KroneckerStatistics:
        """Statistics of no rows, for a rank that did not use a layer."""
        observer, weight = self._observer(), matrix.weight
        if observer is None:
            raise RuntimeError("the optimizer is gone")
        request = observer.request(matrix)
        *batch, d_out, d_in = seen_shape(request.part, matrix)
        sides: list[Statistic] = []
        for side, n in (("input", d_in), ("grad", d_out)):
            nothing = torch.zeros(*batch, n, 0, dtype=weight.dtype, device=weight.device)
            sides.append(request.summarize(cast(Side, side), NoColumns(nothing)))
        return KroneckerStatistics(sides[0], sides[1], 0)

    def end_step(self) -> None:
        """Forget what was seen: the step that it was for is over."""
        self.step += 1
        self.count.end_step()
        self.is_sampled = False
        for accumulator in self.accumulators.values():
            accumulator.end_step()

    def reset(self) -> None:
        """Forget what was seen: gradients are reset, of passes that may have begun already.

        What :meth:`curvature` saw stays.
        """
        if not self.is_sampled:
            self.count.reset()
            self.discard()

    def discard(self) -> None:
        """Forget all statistics."""
        for accumulator in self.accumulators.values():
            accumulator.discard()
