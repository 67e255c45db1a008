"""The torch.optim shell around a method: groups, capture, the step, and checkpoints."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from singd import diagnostics
from singd.capture.capture import Capture
from singd.capture.transient import once_filled
from singd.methods.base import Method
from singd.ops import cuda_graph
from singd.passes import Passes
from singd.placement import Placement, find_placement, unwrapped
from singd.state import checkpoint
from singd.state.loading import copies, fitting, names, put, spread
from singd.state.plan import Plan, make_plan
from singd.step.attempt import attempt, ensure, place
from singd.step.factor_store import FactorStore
from singd.step.fallback import Fallback
from singd.step.groups import as_groups, check_group, check_watching, counters, parameter_of
from singd.step.observer import StepObserver
from singd.step.parameters import Parameters, check_model, optional_layers
from singd.step.pipeline import Parts
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
    "sample": 1,
}
"""Options of a group that every method has, and their defaults."""


class KroneckerOptimizer(Passes, Optimizer):
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
        data: Mesh, or names of its dimensions, over which samples differ, of a sharded model.
        places: Where factors of a sharded model are worked on, see :mod:`singd.placement.places`.

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
        data: Any = None,
        places: Any = None,
    ) -> None:
        model, wrapper = unwrapped(model)
        check_model(model)
        types = optional_layers(layers)
        check_watching(max_skipped, telemetry)
        options = {**DEFAULTS, **(defaults or {})}
        groups = as_groups(params, model)
        check_group(options)
        method.check(options)
        self.model, self.telemetry, self._sharding = model, telemetry, (data, places)
        fallback = Fallback(adamw, options["lr"], self.adamw_ratio)
        placement = find_placement(model, process_group, data, places, wrapper)
        self._connect(method, placement, SkippedSteps(), fallback, max_skipped, types)
        self._parts.parameters.expected.update(parameter_of(p) for g in groups for p in g["params"])
        super().__init__(groups, options)
        if places is not None:
            place(self._parts)  # a place that does not fit is an error here

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
        if any(p in parts.parameters.group_of for p in given) or len(set(given)) < len(given):
            raise ValueError("add_param_group: some parameters appear in more than one group")
        adamw = parts.fallback.for_group({**group, "lr": whole["lr"]})
        super().add_param_group(group | counters(whole) | {"adamw": adamw})
        self._take(given)

    def _take(self, given: Sequence[Tensor]) -> None:
        """Find and watch the matrices of parameters that are in the groups already."""
        parts = self._parts
        new = parts.parameters.find(given)
        parts.parameters.matrices += new
        parts.parameters.bind(self.param_groups)
        if parts.method.needs_activations:
            parts.capture.watch(self.model, new)

    def plan(self) -> Plan:
        """What trains each parameter, and what is stored; the model may be on the meta device."""
        parts = self._parts
        parts.placement.prepare()
        place(parts)
        return make_plan(type(self).__name__, parts)

    # The step -----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update factors that are due, then every parameter that has a gradient.

        If a gradient or a statistic is not finite, nothing is changed: ``skipped`` counts the step.

        Args:
            closure: Function that evaluates the loss and its gradients; its result is returned.

        Raises:
            FloatingPointError: If ``max_skipped`` steps in a row were skipped.
            RuntimeError: If a gradient is sparse, or a CUDA graph cannot record this step.
            ValueError: If an option that was set is out of range, or a parameter was replaced.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._run(descend=True)
        return loss

    @torch.no_grad()
    def precondition(self, scale: float | Tensor | None = None) -> None:
        """Replace every gradient of a preconditioned layer by its direction.

        Factors that are due are updated. Directions have the length that ``graft`` says, bounded by
        ``kl_clip``. The step of any other optimizer may follow.

        Args:
            scale: Factor by which a GradScaler multiplied the loss; gradients are to be unscaled.
        """
        self._run(descend=False, scale=None if scale is None else torch.as_tensor(scale))

    def _run(self, *, descend: bool, scale: Tensor | None = None) -> None:
        parts, observe = self._parts, self.telemetry is not None
        if cuda_graph.is_capturing():
            cuda_graph.check_recordable(parts.max_skipped, self.telemetry)
        report = attempt(parts, self.param_groups, self.state, scale, descend, observe)
        if report is None:
            return
        if self.telemetry is not None:
            self.telemetry(diagnostics.describe(report, parts.skipping.total))
        parts.skipping.check(report.cause, parts.max_skipped)

    def _ensure(self) -> None:
        """Make factors where there are none, or where the state or the options changed."""
        ensure(self._parts, self.param_groups, self.state)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients, and forget their statistics.

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
            spread(self._parts, self.param_groups, state)
            return checkpoint.pack(state, names(self._parts, self.param_groups))

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
            options = [*self.defaults, "adamw", "handed_over", "peak_lr", "step"]
            fitted.update(fitting(self._parts, self.param_groups, options, state))
            return fitted

        def restore(_: Optimizer) -> None:
            put(self.state, copies(self._parts, self.param_groups, fitted))
            self._parts.parameters.bind(self.param_groups)

        handles = [
            self.register_load_state_dict_pre_hook(fit),  # the last one
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(copy.copy(state_dict))
        finally:
            for handle in handles:
                handle.remove()

    # Copies -------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """For :mod:`copy` and :mod:`pickle`, best together with the model."""
        parts = self._parts
        parts.skipping.settle()
        left = ("_parts", "_observer", "step")
        state = {
            k: v for k, v in vars(self).items() if k not in left and not k.startswith("_optimizer_")
        }
        shared = parts.method, parts.skipping, parts.fallback, parts.max_skipped
        return {**state, "_copied": (*shared, parts.parameters.layers)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        copied = state.pop("_copied", None)
        super().__setstate__(state)
        if copied is not None:  # or else it is a part of loading a checkpoint
            once_filled(self.model, functools.partial(self._reconnect, *copied))

    def _reconnect(self, method: Method, *others: Any) -> None:
        self._connect(method, find_placement(self.model, None, *self._sharding), *others)
        self._take([p for group in self.param_groups for p in group["params"]])
