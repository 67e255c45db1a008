"""The torch.optim shell shared by the Kronecker-factored methods.

It decides which parameters are preconditioned, captures their statistics, trains all others with
AdamW, bounds the step, and keeps state as plain tensors keyed to the parameter. A method fills in
what it stores and how it turns statistics into a preconditioned gradient.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from singd import checkpoint, distributed, grafting
from singd._layer import flatten_rows, square_sums
from singd.amp import calling_scale
from singd.capture import Statistics, Unit
from singd.grouping import Bucket, Members, buckets
from singd.hooks import Capture
from singd.layers import OPTIONAL
from singd.loss_scale import LossCheck
from singd.options import (
    LOSS_AVERAGES,
    Group,
    given_group,
    in_range,
    integer,
    one_of,
    parameter_of,
    peak_lr,
)
from singd.passes import Passes
from singd.plan import Plan, find_units, make_plan, owners_of
from singd.stepping import Step
from structured import Diagonal, Structure, StructuredMatrix

KRONECKER, ADAMW = "kronecker", "adamw"


class KroneckerOptimizer(Optimizer):
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
        adamw: Options of :class:`torch.optim.AdamW` for all other parameters.
        layers: Types among :data:`singd.layers.OPTIONAL` that are preconditioned as well; or "all".
        max_skipped: Steps in a row that may be skipped since something was not finite; ``None``
            looks for nothing, and spares the wait for the device that it takes.
        telemetry: Called after every step with norms, the bound, residuals and skipped steps.
        process_group: Of the ranks that share the data, if not all do. Statistics are summed over
            it, and gradients averaged unless ``model`` is wrapped in DistributedDataParallel.
    """

    _identity: tuple[str, ...] = ("structures",)  # options that a checkpoint must share
    _sides = ("K", "C")  # members with the structure of the statistics

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None,
        defaults: Group,
        adamw: Mapping[str, Any] | None,
        layers: Collection[type[nn.Module]] | str = (),
        max_skipped: int | None = 10,
        telemetry: Callable[[dict[str, Any]], None] | None = None,
        process_group: Any = None,
    ) -> None:
        model, reduced = distributed.unwrapped(model)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        distributed.refuse_sharded(model)
        for name, p in model.named_parameters():
            if isinstance(p, nn.parameter.UninitializedParameter):
                raise ValueError(f"{name} is not initialised yet: run one forward pass first")
        self.model = model
        named: Any = OPTIONAL if layers == "all" else layers
        self._layers: tuple[type[nn.Module], ...] = tuple(named)
        for layer in self._layers:
            one_of("layers", layer, tuple(OPTIONAL))
        self._adamw = AdamW([torch.zeros(0)], **(adamw or {}))
        self._units: list[Unit] = []
        self._groups: dict[int, Group] = {}  # by id of a parameter
        self._bucket_list: list[Bucket] | None = None
        self._passes = Passes()
        self._process_group = process_group
        self._reduce_gradients = not reduced
        self.skipped = self._skipped_in_row = 0
        if max_skipped is not None:
            integer("max_skipped", max_skipped, 0)
        if telemetry is not None and not callable(telemetry):
            raise ValueError(f"telemetry: expected a function or None, got {telemetry!r}")
        self.max_skipped, self.telemetry = max_skipped, telemetry
        self._watch()
        self._loss_check: LossCheck | None = LossCheck(model)
        weakref.finalize(self, self._loss_check.close)
        params = [p for p in model.parameters() if p.requires_grad] if params is None else params
        params = [given_group(p) if isinstance(p, Mapping) else p for p in params]
        groups = params if params and isinstance(params[0], dict) else [{"params": params}]
        self._given = {id(parameter_of(p)) for group in groups for p in group["params"]}
        super().__init__(params, defaults)

    # What a method fills in ---------------------------------------------------------------------

    @abstractmethod
    def _fresh(self, unit: Unit, batch: tuple[int, ...], device: torch.device | str) -> Members:
        """What is stored of a unit before any update, with further leading batch dimensions."""

    @abstractmethod
    def _statistic(self, unit: Unit, side: str, X: Tensor, part: int) -> StructuredMatrix:
        """What to sum of the columns ``X [..., n, R]``; ``side`` is ``"K"`` or ``"C"``."""

    @abstractmethod
    def _update(
        self,
        group: Group,
        old: Members,
        products: Members,
        U_K: StructuredMatrix,
        U_C: StructuredMatrix,
    ) -> Members:
        """New values of what is stored, from the statistics of the Kronecker factors.

        ``products`` are those of ``old``, if any are kept.
        """

    def _products(self, group: Group, members: Members) -> Members:
        """Products worth keeping until the next update."""
        return {}

    @abstractmethod
    def _precondition(self, members: Members, products: Members, G: Tensor) -> Tensor:
        """The preconditioned gradient, a new tensor, for ``G [..., d_out, d_in]``."""

    def _structures(self, unit: Unit) -> tuple[Structure, ...]:
        """The structures of a unit's factors."""
        return ()

    def _check_group(self, group: Group) -> None:
        """Raise if an option of a preconditioned group makes no sense."""
        for name in ("lr", "damping", "weight_decay"):
            in_range(name, group[name], 0.0, float("inf"))
        in_range("momentum", group["momentum"], 0.0, 1.0, open_end=True)
        integer("T", group["T"], 1)
        integer("seed", group["seed"])
        one_of("loss_average", group["loss_average"], LOSS_AVERAGES)
        one_of("kfac_approx", group["kfac_approx"], ("expand", "reduce"))
        one_of("graft", group["graft"], grafting.METHODS)
        if group["kl_clip"] is not None:
            in_range("kl_clip", group["kl_clip"], 0.0, float("inf"))

    # Parameters and groups ----------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters, split into a preconditioned group and one for AdamW.

        Raises:
            ValueError: If an option is out of range; nothing is added then.
        """
        group = given_group(param_group)
        given = group.pop("params")
        ids = {id(parameter_of(p)) for p in given}
        self._check_group({**self.defaults, **group})
        if ids & self._groups.keys() or len(ids) < len(given):
            raise ValueError("add_param_group: some parameters appear in more than one group")
        self._given |= ids
        taken = set(self._groups)
        units = [
            unit
            for unit in find_units(self.model, self._given, taken, self._layers)
            if id(unit.weight) in ids
        ]
        ours = {id(p) for unit in (*units, *self._units) for p in unit.parameters}
        kronecker = [p for p in given if id(parameter_of(p)) in ours]
        others = [p for p in given if id(parameter_of(p)) not in ours]
        if kronecker or not given:
            lr = group.get("lr", self.defaults["lr"])
            own = {**group, "params": kronecker, "rule": KRONECKER, "step": 0, "peak_lr": lr}
            super().add_param_group(own)
        if others:
            shared = {k: v for k, v in group.items() if k in self._adamw.defaults}
            if kronecker:
                shared = {k: v for k, v in shared.items() if k not in self.defaults}
            own = {**self._adamw.defaults, **shared, "params": others, "rule": ADAMW}
            super().add_param_group(own)
            for key in self.defaults.keys() - self._adamw.defaults.keys():
                del self.param_groups[-1][key]
        self._units += units
        self._bind()
        self._capture.watch(self.model, units)

    def _watch(self) -> None:
        """Begin to capture; that ends with :meth:`close`, or with this object."""
        self._capture = Capture(self._wanted, self._measure)
        weakref.finalize(self, self._capture.close)

    def _bind(self) -> None:
        """Find every unit's group and state again, after either was replaced."""
        self._groups = {id(p): g for g in self.param_groups for p in g["params"]}
        self._places = [
            (name, p, module._parameters, key, tuple(p.shape))
            for name, p, module, key in owners_of(self.model)
            if id(p) in self._groups
        ]
        self._bucket_list = None
        for unit in self._units:
            unit.group = self._groups.get(id(unit.weight), unit.group)
            unit.structures = self._structures(unit)
            unit.layout = self._layout(unit)
            unit.members.clear()

    def _settle(self) -> None:
        """Follow changes of dtype, device and options since the factors were made.

        Raises:
            ValueError: If a parameter was replaced, resized or taken out of its group.
        """
        if [id(p) for g in self.param_groups for p in g["params"]] != list(self._groups):
            raise ValueError(
                "param_groups: expected the parameters that the optimizer was made with, got "
                "others: use add_param_group, or freeze with requires_grad_(False)"
            )
        if any(self._groups[id(p)] is not g for g in self.param_groups for p in g["params"][:1]):
            self._bind()
        for name, p, slots, key, shape in self._places:
            if slots.get(key, p) is not p:
                raise ValueError(
                    f"{name} was replaced after the optimizer was made (by "
                    "load_state_dict(assign=True)?): make the optimizer afterwards"
                )
            if tuple(p.shape) != shape:
                raise ValueError(
                    f"{name}: expected the shape {list(shape)} it had when the optimizer was made, "
                    f"got {list(p.shape)}: make a new optimizer"
                )
            for option, value in self.state.get(p, {}).items():
                if isinstance(value, Tensor) and option != "step":
                    self.state[p][option] = value.to(p)
        for unit in self._units:
            if unit.layout != self._layout(unit):
                self._remake(unit)

    def _remake(self, unit: Unit) -> None:
        """Fit the factors of a unit to its options; they start afresh if the structure changed."""
        before, unit.structures = unit.structures, self._structures(unit)
        unit.layout, self._bucket_list = self._layout(unit), None
        kept = self._fresh(unit, (), "meta") if unit.structures == before else {}
        state = self.state.get(unit.weight, {})
        for name in [k for k, v in state.items() if isinstance(v, list) and k not in kept]:
            del state[name]
        if unit.structures != before:
            unit.discard()

    def _layout(self, unit: Unit) -> tuple[Any, ...]:
        """What the factors of a unit depend on besides statistics."""
        return tuple(unit.weight.shape), unit.weight.dtype, unit.weight.device

    @property
    def _buckets(self) -> list[Bucket]:
        """The units that are preconditioned, grouped; their state is made where there is none."""
        if self._bucket_list is None:
            units = [unit for unit in self._units if not self._is_foreign(unit)]
            with torch.no_grad():
                self._bucket_list = buckets(
                    units, lambda unit, n: self._fresh(unit, (n,), unit.weight.device), self.state
                )
        return self._bucket_list

    def plan(self) -> Plan:
        """Which rule trains each parameter of the model, and what it stores.

        Nothing is allocated: the model may be on the meta device.
        """
        return make_plan(self)

    def _is_adamw(self, p: Tensor) -> bool:
        """Whether AdamW trains ``p``: by its group, or since its use was not understood."""
        return self._groups[id(p)]["rule"] == ADAMW or "exp_avg" in self.state.get(p, {})

    def _is_foreign(self, unit: Unit) -> bool:
        """Whether a unit is left to AdamW."""
        return unit.explained is False or self._is_adamw(unit.weight)

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
        diagonal = isinstance(unit.members[self._sides[0]], Diagonal)
        pieces = [(x, g)] if diagonal else unit.layer.pieces(module, x, g)
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
        ``self.skipped``.

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
        scale = calling_scale() if scale is None else scale
        self._settle()
        if checkpoint.wants_state(self):
            checkpoint.make_state(self)
            return
        if distributed.size(self._process_group) > 1:
            distributed.agree(self)
        if self._loss_check is not None:
            self._check_loss(self._loss_check, scale)
        step = Step(self, scale)
        bad = step.run(descend=descend)
        self._forget()
        if bad is None:
            self._skipped_in_row = 0
            for group in self.param_groups:
                if group["rule"] == KRONECKER:
                    group["step"] += 1
                    group["peak_lr"] = peak_lr(group)
        else:
            self.skipped += 1
            self._skipped_in_row += 1
        if self.telemetry is not None and step.report is not None:
            self.telemetry({"skipped": self.skipped, **step.report})
        if self.max_skipped is not None and self._skipped_in_row >= self.max_skipped > 0:
            raise FloatingPointError(
                f"{bad}: gradient or statistics not finite in {self._skipped_in_row} steps in a row"
            )

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

    # Copies -------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """For :mod:`copy` and :mod:`pickle`, best together with the model."""
        found = (
            "_capture",
            "_loss_check",
            "_groups",
            "_given",
            "_places",
            "_bucket_list",
            "_process_group",
        )
        return {
            k: v
            for k, v in vars(self).items()
            if k not in (*found, "step") and not k.startswith("_optimizer_")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "model" in state:  # else this is a part of loading a checkpoint
            self._process_group = self._loss_check = None
            self._given = {id(p) for group in self.param_groups for p in group["params"]}
            self._watch()
            self._bind()
            self._capture.watch(self.model, self._units)

    # Checkpoints --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """State and options as plain tensors, numbers and strings.

        ``torch.load`` restores it with its default ``weights_only=True``. Structures appear as
        specs; an option that is a function is left out, and kept by the optimizer that loads.
        """
        return checkpoint.pack(super().state_dict(), self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state. ``state_dict`` is neither changed nor shared; dtypes are kept.

        Raises:
            ValueError: If the state is of another model, method or structure. Nothing is changed.
        """
        checkpoint.load(self, state_dict)
        self._bind()
