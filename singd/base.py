"""The torch.optim shell shared by the Kronecker-factored methods.

It decides which parameters are preconditioned, captures their statistics, trains all others with
AdamW, bounds the step, and keeps state as plain tensors keyed to the parameter. A method fills in
what it stores and how it turns statistics into a preconditioned gradient.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import AdamW, Optimizer

from singd import checkpoint
from singd.capture import Capture, Statistics, Unit
from singd.layers import find_layer, flatten_rows
from singd.rounding import stochastic_round
from singd.update import trust_region
from structured import StructuredMatrix

LOSS_AVERAGES = (None, "batch", "batch+sequence")
KRONECKER, ADAMW = "kronecker", "adamw"


class KroneckerOptimizer(Optimizer):
    """Base of :class:`singd.SINGD` and :class:`singd.KFAC`.

    Every parameter group given is split by rule: the weights (with biases) of supported layers are
    preconditioned, all other parameters are trained by AdamW with the options ``adamw``. The key
    ``"rule"`` of a group says which.

    Args:
        model: The model whose layers are hooked.
        params: Parameters or parameter groups, as for any optimizer; all trainable parameters of
            ``model`` if ``None``.
        defaults: Options of the preconditioned groups.
        adamw: Options of :class:`torch.optim.AdamW` for all other parameters.
    """

    _step_supports_amp_scaling = True  # PyTorch's name: GradScaler hands us scale and infinities

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None,
        defaults: dict[str, Any],
        adamw: Mapping[str, Any] | None,
    ) -> None:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        self.model = model
        self._adamw = AdamW([torch.zeros(0)], **(adamw or {}))
        self._units: list[Unit] = []
        self._groups: dict[int, dict[str, Any]] = {}  # by id of a parameter
        self._generators: dict[torch.device, torch.Generator] = {}  # of the step under way
        self._capture = Capture(self._wanted, self._measure)
        if params is None:
            params = [p for p in model.parameters() if p.requires_grad]
        super().__init__(params, defaults)

    # What a method fills in ---------------------------------------------------------------------

    @abstractmethod
    def _statistic(self, unit: Unit, side: str, X: Tensor) -> StructuredMatrix:
        """What to sum of the columns ``X [..., n, R]``; ``side`` is ``"K"`` or ``"C"``."""

    @abstractmethod
    def _update(
        self, unit: Unit, seen: Statistics, scale_K: float, scale_C: Tensor | float
    ) -> None:
        """Update the unit's factors; ``S_K = scale_K U_K`` and ``S_C = scale_C U_C``."""

    @abstractmethod
    def _precondition(self, unit: Unit, G: Tensor) -> Tensor:
        """The preconditioned gradient for ``G [..., d_out, d_in]``."""

    def _attach(self, unit: Unit) -> None:
        """Bind the unit to its state, after construction and after loading."""

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise if an option of a preconditioned group makes no sense."""
        for name in ("lr", "damping", "weight_decay"):
            in_range(name, group[name], 0.0, float("inf"))
        in_range("momentum", group["momentum"], 0.0, 1.0, open_end=True)
        if not isinstance(group["T"], int) or group["T"] < 1:
            raise ValueError(f"T: expected an integer >= 1, got {group['T']!r}")
        one_of("loss_average", group["loss_average"], LOSS_AVERAGES)
        one_of("kfac_approx", group["kfac_approx"], ("expand", "reduce"))
        if group["kl_clip"] is not None:
            in_range("kl_clip", group["kl_clip"], 0.0, float("inf"))

    # Parameters and groups ----------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, split into a preconditioned group and one for AdamW.

        Raises:
            ValueError: If an option is out of range; nothing is added then.
        """
        group = dict(param_group)
        given = group.pop("params")
        given = [given] if isinstance(given, Tensor) else list(given)
        named = [p if isinstance(p, tuple) else (None, p) for p in given]
        taken = {id(p) for g in self.param_groups for p in g["params"]}
        units = self._find_units({id(p) for _, p in named} - taken)
        ours = {id(p) for unit in units for p in unit.parameters}
        rules = {
            KRONECKER: [n_p for n_p in named if id(n_p[1]) in ours],
            ADAMW: [n_p for n_p in named if id(n_p[1]) not in ours],
        }
        self._check_group({**self.defaults, **group})
        for rule, members in rules.items():
            if not members and (named or rule == ADAMW):
                continue
            params = [p if name is None else (name, p) for name, p in members]
            own = group if rule == KRONECKER else self._adamw.defaults
            super().add_param_group({**own, "params": params, "rule": rule})
            if rule == ADAMW:
                for key in self.defaults.keys() - self._adamw.defaults.keys():
                    del self.param_groups[-1][key]
            else:
                self.param_groups[-1].setdefault("step", 0)
        self._units += units
        self._bind()
        self._capture.watch(units)

    def _bind(self) -> None:
        """Find every unit's group and state again, after either was replaced."""
        self._groups = {id(p): g for g in self.param_groups for p in g["params"]}
        for unit in self._units:
            unit.group = self._groups[id(unit.weight)]
            self._attach(unit)

    def _find_units(self, params: set[int]) -> list[Unit]:
        """Supported layers of the model with a weight among ``params`` (ids)."""
        owners: dict[int, list[tuple[str, nn.Module]]] = {}
        for name, module in self.model.named_modules():
            for p in module._parameters.values():
                if p is not None:
                    owners.setdefault(id(p), []).append((name, module))
        units = {}
        for module_name, module in self.model.named_modules():
            layer = find_layer(module)
            weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
            if layer is None or weight is None or id(weight) not in params:
                continue
            shared = [owner for _, owner in owners[id(weight)]]
            if id(weight) in units or any(find_layer(owner) is not layer for owner in shared):
                continue
            if bias is not None and (
                id(bias) not in params or len(owners[id(bias)]) != len(shared)
            ):
                bias = None
            units[id(weight)] = Unit(module_name, shared, layer, weight, bias, {})
        return list(units.values())

    # Statistics ---------------------------------------------------------------------------------

    def _wanted(self, unit: Unit) -> bool:
        """Whether the next step updates the unit's factors."""
        due: bool = unit.group["step"] % unit.group["T"] == 0
        return due

    def _measure(self, unit: Unit, x: Tensor, g: Tensor) -> Statistics:
        """The contribution of one use of a layer with input ``x`` and output gradient ``g``."""
        approximation, module = unit.group["kfac_approx"], unit.module
        inputs, grads = unit.layer.inputs(module, x), unit.layer.grads(module, g)
        ones = unit.bias is not None
        A = flatten_rows(inputs, approximation, average=True, ones=ones)
        B = flatten_rows(grads, approximation, average=False)
        return Statistics(
            self._statistic(unit, "K", A),
            self._statistic(unit, "C", B),
            rows=A.shape[-1],
            samples=grads.shape[-3],
            positions=grads.shape[-2],
        )

    # The step -----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update factors that are due, then every parameter that has a gradient.

        Args:
            closure: Evaluates the loss and its gradients; optional.

        Returns:
            The loss, if a closure was given.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale = getattr(self, "grad_scale", None)
        if not self._found_inf():
            if scale is not None:
                grads = [
                    p.grad for g in self.param_groups for p in g["params"] if p.grad is not None
                ]
                torch._foreach_mul_(grads, 1.0 / scale)
            self._step(scale)
        for unit in self._units:
            unit.discard()
        for group in self.param_groups:
            if group["rule"] == KRONECKER:
                group["step"] += 1
        return loss

    def _found_inf(self) -> bool:
        """Whether a GradScaler met infinities: then the step is skipped whole."""
        found = getattr(self, "found_inf", None)
        return found is not None and bool(found)

    def _step(self, scale: Tensor | None) -> None:
        self._generators.clear()
        directions: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}
        quadratic: list[Tensor] = []
        for unit in self._units:
            if unit.statistics is not None and self._wanted(unit):
                self._update_from(unit, unit.statistics, scale)
            if all(p.grad is None for p in unit.parameters):
                continue
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in unit.parameters]
            G = unit.join(grads[0], grads[1] if len(grads) > 1 else None)
            natural = self._precondition(unit, G)
            if unit.group["kl_clip"] is not None:
                inner = torch.sum(natural.float() * G.float())
                quadratic.append(unit.group["lr"] ** 2 * inner)
            for p, direction in zip(unit.parameters, unit.split(natural), strict=True):
                if p.grad is not None:
                    directions.setdefault(id(self._groups[id(p)]), []).append((p, direction))
        total = torch.stack([q.to(quadratic[0]) for q in quadratic]).sum() if quadratic else None
        for group in self.param_groups:
            if id(group) in directions:
                self._move(group, directions[id(group)], total)
        self._adamw.param_groups = [g for g in self.param_groups if g["rule"] == ADAMW]
        if self._adamw.param_groups:
            self._adamw.state = self.state
            self._adamw.step()

    def _update_from(self, unit: Unit, seen: Statistics, scale: Tensor | None) -> None:
        """Normalise the statistics, once, and update the factors."""
        average = unit.group["loss_average"]
        terms = {None: 1, "batch": seen.samples, "batch+sequence": seen.samples * seen.positions}
        scale_C = terms[average] if scale is None else terms[average] / scale.double().square()
        if seen.rows:
            self._update(unit, seen, 1.0 / seen.rows, scale_C)

    def _move(
        self,
        group: dict[str, Any],
        moves: Sequence[tuple[nn.Parameter, Tensor]],
        quadratic: Tensor | None,
    ) -> None:
        """Weight decay, momentum and the step, for one group."""
        params: list[Tensor] = [p for p, _ in moves]
        directions = [d.to(p.dtype) for p, d in moves]
        if group["kl_clip"] is not None and quadratic is not None:
            nu = trust_region(group["kl_clip"], quadratic)
            torch._foreach_mul_(directions, nu.to(directions[0].dtype))
        if group["weight_decay"] != 0:
            torch._foreach_add_(directions, params, alpha=group["weight_decay"])
        if group["momentum"] != 0:
            buffers = []
            for p in params:
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffers.append(state["momentum_buffer"])
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, directions)
            directions = buffers
        if all(p.dtype in (torch.float32, torch.float64) for p in params):
            torch._foreach_add_(params, directions, alpha=-group["lr"])
            return
        for p, direction in zip(params, directions, strict=True):
            moved = p.float() - group["lr"] * direction.float()
            p.copy_(self._rounded(moved, p.dtype, group))

    def _rounded(self, x: Tensor, dtype: torch.dtype, group: Mapping[str, Any]) -> Tensor:
        """Round stochastically, reproducibly from the seed and the number of the step."""
        if x.device not in self._generators:
            generator = torch.Generator(x.device)
            generator.manual_seed((group["seed"] << 32) + group["step"])
            self._generators[x.device] = generator
        return stochastic_round(x, dtype, self._generators[x.device])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients, and forget the statistics that came with them."""
        for unit in self._units:
            unit.discard()
        super().zero_grad(set_to_none)

    def close(self) -> None:
        """Remove every hook from the model."""
        self._capture.close()

    # Checkpoints --------------------------------------------------------------------------------

    _identity: tuple[str, ...] = ()  # options that a checkpoint must share

    def _expected_shapes(self, p: Tensor, unit: Unit | None) -> dict[str, Any]:
        """Shapes of the state of a parameter, by key."""
        like = checkpoint.shapes(p)
        return {"momentum_buffer": like, "exp_avg": like, "exp_avg_sq": like}

    def state_dict(self) -> dict[str, Any]:
        """State and options as plain tensors, numbers and strings.

        ``torch.load`` restores it with its default ``weights_only=True``. Structures appear as
        specs; an option that is a function is left out, and kept by the optimizer that loads.
        """
        packed: dict[str, Any] = super().state_dict()
        packed["param_groups"] = [checkpoint.plain_group(g) for g in packed["param_groups"]]
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state. ``state_dict`` is neither changed nor shared; dtypes are kept.

        Raises:
            ValueError: If the state is of another model, method or structure. Nothing is changed.
        """
        state, saved = state_dict["state"], state_dict["param_groups"]
        units = {id(unit.weight): unit for unit in self._units}
        checkpoint.check_groups(self.param_groups, saved, ("rule", *self._identity))
        names = {id(p): name for name, p in self.model.named_parameters()}
        for p, number in checkpoint.pairs(self.param_groups, saved):
            expected = self._expected_shapes(p, units.get(id(p)))
            checkpoint.check_state(names.get(id(p), "parameter"), state.get(number, {}), expected)
        groups = checkpoint.merged(self.param_groups, saved)
        super().load_state_dict({"state": state, "param_groups": groups})
        # The base class casts to the parameter's dtype and may share memory: put copies back.
        for p, number in checkpoint.pairs(self.param_groups, saved):
            if number in state:
                self.state[p] = {k: checkpoint.copied(v, k, p) for k, v in state[number].items()}
        self._bind()


def in_range(name: str, value: Any, low: float, high: float, *, open_end: bool = False) -> None:
    """Raise unless ``low <= value <= high`` (or ``< high``)."""
    good = isinstance(value, int | float | Tensor) and not isinstance(value, bool)
    if not good or not (low <= value and (value < high if open_end else value <= high)):
        bracket = ")" if open_end or high == float("inf") else "]"
        raise ValueError(f"{name}: expected a number in [{low:g}, {high:g}{bracket}, got {value!r}")


def one_of(name: str, value: Any, known: Sequence[Any]) -> None:
    """Raise unless ``value`` is one of ``known``."""
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}")
