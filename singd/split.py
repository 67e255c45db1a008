"""Which parameters are preconditioned: groups split by rule, and where their state is kept.

A unit, a weight with its bias, has Kronecker factors; every other parameter is AdamW's.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from singd import distributed, grafting
from singd.capture import Unit
from singd.grouping import Bucket, Members, buckets
from singd.hooks import Capture
from singd.layers import OPTIONAL
from singd.loss_scale import LossCheck
from singd.options import (
    LOSS_AVERAGES,
    Group,
    counter_device,
    given_group,
    in_range,
    integer,
    one_of,
    parameter_of,
)
from singd.passes import Passes
from singd.plan import find_units, owners_of
from singd.verdict import Verdict
from structured import Structure

KRONECKER, ADAMW = "kronecker", "adamw"
ADAMW_LR = 3e-3  # embeddings and norms learn too slowly beside curvature at AdamW's own 1e-3


class SplitOptimizer(Optimizer):
    """The groups, units and buckets of a :class:`singd.base.KroneckerOptimizer`, and its copies."""

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
        self._adamw = AdamW([torch.zeros(0)], **{"lr": ADAMW_LR, **(adamw or {})})
        self._units: list[Unit] = []
        self._groups: dict[int, Group] = {}  # by id of a parameter
        self._bucket_list: list[Bucket] | None = None
        self._passes = Passes()
        self._process_group = process_group
        self._reduce_gradients = not reduced
        self._verdict = Verdict()
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

    @abstractmethod
    def _wanted(self, unit: Unit) -> bool:
        """Whether a pass that begins now is captured for the unit."""

    @abstractmethod
    def _measure(
        self, unit: Unit, module: nn.Module, x: Tensor, g: Tensor, part: int, root: int
    ) -> None:
        """Take in one use of ``module`` with input ``x`` and output gradient ``g``."""

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
            peak = lr.clone() if isinstance(lr, Tensor) else lr
            own = {**group, "params": kronecker, "rule": KRONECKER, "step": 0, "peak_lr": peak}
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
            (name, p, module._parameters, key, p.shape)
            for name, p, module, key in owners_of(self.model)
            if id(p) in self._groups
        ]
        self._kinds: dict[int, tuple[Any, ...]] = {}  # of the parameters whose state is like them
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
            if p.shape != shape:
                raise ValueError(
                    f"{name}: expected the shape {list(shape)} it had when the optimizer was made, "
                    f"got {list(p.shape)}: make a new optimizer"
                )
            kind = (p.dtype, p.device)
            if self._kinds.get(id(p)) != kind:
                self._kinds[id(p)] = kind
                own = self.state.get(p, {})
                for option, value in own.items():
                    if option == "step":
                        own[option] = value.to(counter_device(p, self._groups[id(p)]))
                    elif isinstance(value, Tensor):
                        own[option] = value.to(p)
        chosen = {id(g): self._choices(g) for g in self.param_groups if g["rule"] == KRONECKER}
        for unit in self._units:
            if unit.layout != self._layout(unit, chosen.get(id(unit.group))):
                self._remake(unit)

    def _remake(self, unit: Unit) -> None:
        """Fit the factors of a unit to its options; they start afresh if the structure changed."""
        before, unit.structures = unit.structures, self._structures(unit)
        unit.layout, self._bucket_list = self._layout(unit), None
        kept = self._fresh(unit, (), "meta") if unit.structures == before else {}
        state = self.state.get(unit.weight, {})
        for name in [k for k, v in state.items() if isinstance(v, list) and k not in kept]:
            del state[name]
        if unit.structures != before or unit.is_of_its_factors:
            unit.discard()

    def _choices(self, group: Group) -> tuple[Any, ...]:
        """The options of a group that what is stored depends on."""
        return ()

    def _layout(self, unit: Unit, choices: tuple[Any, ...] | None = None) -> tuple[Any, ...]:
        """What the factors of a unit depend on besides statistics."""
        choices = self._choices(unit.group) if choices is None else choices
        return unit.weight.shape, unit.weight.dtype, unit.weight.device, choices

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

    def _is_adamw(self, p: Tensor) -> bool:
        """Whether AdamW trains ``p``: by its group, or since its use was not understood."""
        return self._groups[id(p)]["rule"] == ADAMW or "exp_avg" in self.state.get(p, {})

    def _is_foreign(self, unit: Unit) -> bool:
        """Whether a unit is left to AdamW."""
        return unit.explained is False or self._is_adamw(unit.weight)

    # Copies -------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """For :mod:`copy` and :mod:`pickle`, best together with the model."""
        self._verdict.settle(self.param_groups)
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
