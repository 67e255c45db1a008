"""The torch.optim shell around a method: groups, capture, the step, and checkpoints."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from singd import diagnostics
from singd.capture.capture import Capture
from singd.layers import OPTIONAL
from singd.methods.base import Method
from singd.methods.options import choice, integer
from singd.ops import cuda_graph
from singd.placement import Placement, find_placement, unwrapped
from singd.state import checkpoint
from singd.state.initial import expected_values, make_state, wants_state
from singd.state.plan import Plan, make_plan
from singd.step.factor_store import FactorStore
from singd.step.fallback import Fallback, check_rates
from singd.step.gradient_scaler import calling_scale
from singd.step.groups import as_groups, check_group, keep_peak_lr, parameter_of
from singd.step.observer import StepObserver
from singd.step.parameters import Parameters
from singd.step.pipeline import Parts, agree, pad_statistics, take_step
from singd.step.skipping import SkippedSteps

DEFAULTS: Mapping[str, Any] = {
    "lr": 3e-3,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "decoupled_weight_decay": True,
    "damping": 1e-3,
    "T": 10,
    "loss_average": "batch",
    "kfac_approx": "expand",
    "kl_clip": None,
    "graft": "auto",
    "seed": 0,
}
"""Options of a group that every method has, and their defaults."""


class KroneckerOptimizer(Optimizer):
    """Any :class:`~singd.methods.Method` as an optimizer; base of :class:`singd.SINGD`.

    Weights (with their biases) of supported layers are preconditioned by the method. AdamW trains
    every other parameter of a group, at ``group["adamw"]["lr_ratio"]`` times the group's ``lr``.

    Args:
        model: Model to train; its supported layers are hooked.
        method: Method that makes factors of statistics, and directions of gradients.
        params: Parameters or parameter groups; all trainable parameters of ``model`` if ``None``.
        defaults: Options of the groups, in addition to and in place of :data:`DEFAULTS`.
        adamw: Options of :class:`torch.optim.AdamW` for all other parameters.
        layers: Types among :data:`singd.layers.OPTIONAL` that are preconditioned as well, or "all".
        max_skipped: Steps in a row that may be skipped since something was not finite; ``None``
            looks for nothing. On a GPU it is known one step later, so that nothing waits.
        telemetry: Function that is called after every step with :func:`singd.diagnostics.describe`.
        process_group: Process group of the ranks that share the data, if not all do.
        data: Names of the mesh dimensions over which samples differ, of a sharded model.

    Raises:
        TypeError: If ``model`` or ``params`` is of the wrong kind.
        ValueError: If an option is out of range.
    """

    adamw_ratio = 1.0
    """AdamW's learning rate as a ratio to the group's, unless ``adamw`` says otherwise."""

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        params: Iterable[Any] | None = None,
        defaults: Mapping[str, Any] | None = None,
        *,
        adamw: Mapping[str, Any] | None = None,
        layers: Collection[type[nn.Module]] | str = (),
        max_skipped: int | None = 10,
        telemetry: Callable[[dict[str, Any]], None] | None = None,
        process_group: Any = None,
        data: Sequence[str] | None = None,
    ) -> None:
        model, is_reduced = unwrapped(model)
        _check_model(model)
        types: Any = OPTIONAL if layers == "all" else layers
        for layer in types:
            choice("layers", layer, tuple(OPTIONAL))
        if max_skipped is not None:
            integer("max_skipped", max_skipped, 0)
        if telemetry is not None and not callable(telemetry):
            raise ValueError(f"telemetry: expected a function or None, got {telemetry!r}")
        options = {**DEFAULTS, **(defaults or {})}
        groups = as_groups(params, model)
        check_group(options)
        method.check(options)
        self.model, self.telemetry = model, telemetry
        fallback = Fallback(adamw, options["lr"], self.adamw_ratio)
        self._data = None if data is None else tuple(data)
        placement = find_placement(model, process_group, data, is_reduced=is_reduced)
        self._connect(method, placement, SkippedSteps(), fallback, max_skipped, tuple(types))
        self._parts.parameters.expected.update(
            parameter_of(p) for group in groups for p in group["params"]
        )
        super().__init__(groups, options)

    def _connect(
        self,
        method: Method,
        placement: Placement,
        skipping: SkippedSteps,
        fallback: Fallback,
        max_skipped: int | None,
        layers: tuple[type[nn.Module], ...],
    ) -> None:
        """Put together the objects that take a step; proxies of the optimizer share them."""
        self._observer = StepObserver(self._ensure)
        self._parts = Parts(
            capture=Capture(self.model, self._observer),
            parameters=Parameters(self.model, layers, method.needs_activations),
            store=FactorStore(method),
            method=method,
            placement=placement,
            skipping=skipping,
            fallback=fallback,
            max_skipped=max_skipped,
        )
        self._observer.parts = self._parts
        weakref.finalize(self, self._parts.capture.close)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; the weights of supported layers among them are preconditioned.

        Raises:
            ValueError: If an option is out of range; nothing is added then.
        """
        self._parts.placement.prepare()
        (group,) = as_groups([param_group], self.model)
        parts, given = self._parts, [parameter_of(p) for p in group["params"]]
        whole = {**self.defaults, **group}
        check_group(whole)
        parts.method.check(whole)
        known = parts.parameters.group_of
        if any(p in known for p in given) or len(set(given)) < len(given):
            raise ValueError("add_param_group: some parameters appear in more than one group")
        lr = whole["lr"]
        group |= {
            "adamw": parts.fallback.for_group({**group, "lr": lr}),
            "handed_over": tuple(group.get("handed_over", ())),
            "step": group.get("step", 0),
            "peak_lr": torch.zeros_like(lr) if isinstance(lr, Tensor) else 0.0,
        }
        super().add_param_group(group)
        new = parts.parameters.find(given)
        parts.parameters.matrices += new
        parts.parameters.bind(self.param_groups)
        if parts.method.needs_activations:
            parts.capture.watch(self.model, new)

    def plan(self) -> Plan:
        """Which rule trains each parameter of the model, and what it stores.

        Nothing is allocated: the model may be on the meta device.
        """
        parts = self._parts
        parts.placement.prepare()
        return make_plan(type(self).__name__, parts.parameters, parts.store, parts.fallback)

    # Statistics ---------------------------------------------------------------------------------

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within this context forward passes are not captured."""
        capture = self._parts.capture
        before, capture.is_paused = capture.is_paused, True
        try:
            yield
        finally:
            capture.is_paused = before

    def count_terms(self, terms: float | Tensor) -> None:
        """Say how many terms the loss of this backward pass is a mean over.

        For means over a number that the layers cannot know, such as the tokens that are not
        padding. Counts add up over backward passes, and replace those of ``loss_average`` at the
        coming step. ``zero_grad`` may come between the count and its backward pass.

        Args:
            terms: Number of terms; a tensor costs no wait for the device.
        """
        capture = self._parts.capture
        seen = [m for m, a in capture.accumulators.items() if a.total is not None]
        if not capture.is_sampled and any(m.weight.grad is None for m in seen):
            capture.is_sampled = False
            capture.count.end_step()  # of gradients that were reset by the model
            capture.discard()
        capture.count.add(terms)

    def close(self) -> None:
        """Remove every hook from the model."""
        self._parts.capture.close()

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
        capture = self._parts.capture
        capture.count.end_step()
        capture.discard()
        saved = [(p, p.grad) for group in self.param_groups for p in group["params"]]
        for p, _ in saved:
            p.grad = None
        capture.is_sampled = False
        try:
            yield
        finally:
            capture.is_sampled = True
            for p, grad in saved:
                p.grad = grad

    # The step -----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update factors that are due, then every parameter that has a gradient.

        If a gradient or a statistic is not finite, nothing is changed, and the step is counted in
        ``self.skipped``. On a GPU that is known at the next step, or when ``skipped`` is asked for.

        Args:
            closure: Function that evaluates the loss and its gradients; optional.

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
            scale: Factor by which a GradScaler multiplied the loss; gradients are to be unscaled.
        """
        self._run(descend=False, scale=None if scale is None else torch.as_tensor(scale))

    def _run(self, *, descend: bool, scale: Tensor | None = None) -> None:
        parts, capture, skipping = self._parts, self._parts.capture, self._parts.skipping
        if cuda_graph.is_capturing():
            _check_capture(parts.max_skipped, self.telemetry)
        else:
            skipping.settle()
        scale = calling_scale() if scale is None else scale
        parts.placement.prepare()
        parts.parameters.check(self.param_groups, self.state)
        if wants_state(parts, self.param_groups, self.state):
            self._ensure()
            make_state(parts, self.state)
            return
        agree(parts, self.state)
        self._ensure()
        capture.loss_terms.check(self._loss_averages(), scale)
        statistics = pad_statistics(parts, capture.collect())
        observe = self.telemetry is not None
        report = take_step(
            parts, statistics, self.state, scale=scale, descend=descend, observe=observe
        )
        capture.end_step()
        if report.found_inf is not None:
            skipping.defer(report.found_inf)
        else:
            skipping.count(skipped=report.cause is not None)
        for group in self.param_groups:
            group["step"] += 1
            if report.cause is None:
                keep_peak_lr(group)
        if self.telemetry is not None:
            self.telemetry(diagnostics.describe(report, skipping.total))
        limit = parts.max_skipped
        if limit is not None and report.cause and skipping.in_row >= limit > 0:
            raise FloatingPointError(f"{report.cause} in {skipping.in_row} steps in a row")

    def _ensure(self) -> None:
        """Make factors where there are none, or where the state or the options changed."""
        parts = self._parts
        parts.parameters.check(self.param_groups, self.state)
        changed = parts.store.ensure(parts.parameters.preconditioned(), self.state)
        for matrix, is_restructured in changed.items():
            accumulator = parts.capture.accumulators.get(matrix)
            total = None if accumulator is None else accumulator.total
            if accumulator is not None and total is not None:
                kinds = total.input.kind, total.grad.kind
                if is_restructured or "whitened" in kinds:
                    accumulator.discard(held=True)  # it is of other factors

    def _loss_averages(self) -> set[str | None]:
        """What the groups say the loss is a mean over; nothing where the number is given."""
        terms = self._parts.capture.count.terms
        if isinstance(terms, Tensor) or terms:
            return set()
        return {group["loss_average"] for group in self.param_groups}

    @property
    def skipped(self) -> int:
        """Steps that were skipped so far; waits for the last one where that is not known yet."""
        self._parts.skipping.settle()
        return self._parts.skipping.total

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients, and forget the statistics that came with them.

        What was collected under :meth:`curvature` stays: those gradients were never there.
        """
        self._parts.capture.reset()
        super().zero_grad(set_to_none)

    # Checkpoints --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """State and options as plain tensors, numbers and strings.

        ``torch.load`` restores it with its default ``weights_only=True``. Structures appear as
        specs; an option that is a function is left out, and kept by the optimizer that loads.
        """
        self._parts.skipping.settle()
        if self.state:
            self._ensure()

        def pack(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            return checkpoint.pack(state, self._names())

        handle = self.register_state_dict_post_hook(pack, prepend=True)  # others see the result
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state. ``state_dict`` is neither changed nor shared; dtypes are kept.

        What hooks make of it is what is checked and loaded.

        Raises:
            ValueError: If the state is of another model, method or structure. Nothing is changed.
        """
        self._parts.skipping.settle()
        fitted: dict[str, Any] = {}

        def fit(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            fitted.update(self._fitted(state))
            return fitted

        handles = [
            self.register_load_state_dict_pre_hook(fit),  # the last one
            self.register_load_state_dict_post_hook(lambda _: self._restore(fitted), prepend=True),
        ]
        try:
            super().load_state_dict(copy.copy(state_dict))
        finally:
            for handle in handles:
                handle.remove()

    def _fitted(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A state, checked to be one of this optimizer."""
        parts = self._parts
        parts.placement.prepare()
        fitted = checkpoint.unpack(
            state_dict,
            self.param_groups,
            self._names(),
            parts.method.identity,
            [*self.defaults, "adamw", "handed_over", "peak_lr", "step"],
            self._check_saved_group,
        )
        for p, number, group in self._numbered(fitted):
            entry = fitted["state"].get(number, {})
            expected = expected_values(parts, p, group)
            checkpoint.check_values(parts.parameters.name(p), entry, expected)
        return fitted

    def _restore(self, fitted: dict[str, Any]) -> None:
        """Put copies in the state: the base class casts to the parameter's dtype, or shares."""
        for p, number, _ in self._numbered(fitted):
            if number in fitted["state"]:
                entry = fitted["state"][number]
                self.state[p] = {k: checkpoint.copied(v, k, p) for k, v in entry.items()}
        self._parts.parameters.bind(self.param_groups)

    def _numbered(self, state_dict: Mapping[str, Any]) -> list[tuple[Any, Any, dict[str, Any]]]:
        """Every parameter with its number and its group in a state."""
        saved = [(n, group) for group in state_dict["param_groups"] for n in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        return [(p, n, group) for p, (n, group) in zip(parameters, saved, strict=True)]

    def _check_saved_group(self, group: Mapping[str, Any]) -> None:
        check_group(group)
        check_rates(group["adamw"])
        self._parts.method.check(group)

    def _names(self) -> list[list[str]]:
        """The names of all parameters, group by group."""
        name = self._parts.parameters.name
        return [[name(p) for p in group["params"]] for group in self.param_groups]

    # Copies -------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """For :mod:`copy` and :mod:`pickle`, best together with the model."""
        parts = self._parts
        parts.skipping.settle()
        left = ("_parts", "_observer", "step")
        state = {
            k: v for k, v in vars(self).items() if k not in left and not k.startswith("_optimizer_")
        }
        layers = parts.parameters.layers
        shared = parts.method, parts.skipping, parts.fallback, parts.max_skipped, layers
        return {**state, "_copied": shared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        copied = state.pop("_copied", None)
        super().__setstate__(state)
        if copied is None:  # a part of loading a checkpoint
            return
        method, skipping, fallback, max_skipped, layers = copied
        placement = find_placement(self.model, None, self._data, is_reduced=False)
        self._connect(method, placement, skipping, fallback, max_skipped, layers)
        parameters = self._parts.parameters
        given = [p for group in self.param_groups for p in group["params"]]
        parameters.matrices += parameters.find(given)
        parameters.bind(self.param_groups)
        if method.needs_activations:
            self._parts.capture.watch(self.model, parameters.matrices)


def _check_model(model: Any) -> None:
    """Raise unless ``model`` is a module whose parameters are there."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for name, p in model.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ValueError(f"{name} is not initialised yet: run one forward pass first")


def _check_capture(max_skipped: int | None, telemetry: Any) -> None:
    """Raise ``RuntimeError`` if a step that a CUDA graph records would read a number."""
    if max_skipped is not None or telemetry is not None:
        raise RuntimeError(
            "a step in a CUDA graph cannot look at its numbers: expected max_skipped=None and "
            f"telemetry=None, got {max_skipped} and {telemetry}"
        )
