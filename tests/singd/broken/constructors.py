"""AdamW with a fault in what it takes, or in its groups."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from tests.singd.broken.plain import Around, PlainAdamW, fails


@fails(
    *("is_an_optimizer", "printing", "schedules", "first_rates", "tensor_rates"),
    *("resumed_schedules", "copies", "hooks_of_steps"),
)
class NoOptimizer:
    def __init__(self, *args: Any, **options: Any) -> None:
        self.__dict__["inner"] = PlainAdamW(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.inner, name, value)


@fails("one_tensor")
class TakesOneTensor(PlainAdamW):
    def __init__(self, model: nn.Module, params: Any = None, **options: Any) -> None:
        super().__init__(model, [params] if isinstance(params, Tensor) else params, **options)


@fails("sets")
class TakesSets(PlainAdamW):
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group["params"], set):
            param_group["params"] = list(param_group["params"])
        super().add_param_group(param_group)


@fails("nothing")
class TakesAllForNothing(PlainAdamW):
    def __init__(self, model: nn.Module, params: Any = None, **options: Any) -> None:
        super().__init__(model, None if params == [] else params, **options)


@fails("no_parameters")
class TakesAnything(PlainAdamW):
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        params = param_group["params"]
        if isinstance(params, list) and all(isinstance(p, Tensor) for p in params):
            param_group["params"] = [p if p.is_leaf else p.detach() for p in params]
        super().add_param_group(param_group)


@fails("duplicates", "refusals_leave_no_trace")
class TakesDuplicates(PlainAdamW):
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        met = {p for group in self.param_groups for p in group["params"]}
        if isinstance(param_group["params"], list) and not met.isdisjoint(param_group["params"]):
            return
        super().add_param_group(param_group)


@fails("half_named", "named")
class DropsNames(PlainAdamW):
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group["params"], list):
            named = [p if isinstance(p, tuple) else ("", p) for p in param_group["params"]]
            param_group["params"] = [p for _, p in named]
        super().add_param_group(param_group)


@fails("iterators")
class ReadsTwice(PlainAdamW):
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if inspect.isgenerator(param_group["params"]):
            list(param_group["params"])
            param_group["params"] = list(param_group["params"])
        super().add_param_group(param_group)


@fails("rates")
class TakesNegativeRates(PlainAdamW):
    def __init__(
        self, model: nn.Module, params: Any = None, lr: Any = 1e-2, **options: Any
    ) -> None:
        super().__init__(model, params, abs(lr), **options)


@fails("decays")
class TakesNegativeDecays(PlainAdamW):
    def __init__(
        self, model: nn.Module, *args: Any, weight_decay: float = 0, **options: Any
    ) -> None:
        super().__init__(model, *args, weight_decay=abs(weight_decay), **options)


@fails("unknown_options")
class TakesUnknownOptions(PlainAdamW):
    def __init__(self, *args: Any, no_such_option: Any = None, **options: Any) -> None:
        super().__init__(*args, **options)


@fails("refusals_leave_no_trace")
class AddsBeforeItChecks(PlainAdamW):
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        for group in self.param_groups:
            group["count"] = len(self.param_groups)
        super().add_param_group(param_group)


@fails("printing")
class PrintsNothing(PlainAdamW):
    def __repr__(self) -> str:
        return "an optimizer"


@fails("number_and_order", "names")
class Sorts(PlainAdamW):
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if "param_names" not in self.param_groups[-1]:
            self.param_groups[-1]["params"].sort(key=lambda p: p.ndim)


@fails("own_keys", "schedules", "first_rates", "resumed_schedules")
class DropsKeys(Around):
    def after(self) -> None:
        for group in self.param_groups:
            for key in group.keys() - self.defaults.keys() - {"params", "param_names"}:
                del group[key]


@fails("own_rates")
class OneRate(Around):
    def before(self) -> None:
        for group in self.param_groups:
            group["lr"] = self.param_groups[0]["lr"]


@fails("own_decays")
class OneDecay(Around):
    def before(self) -> None:
        for group in self.param_groups:
            group["weight_decay"] = self.param_groups[0]["weight_decay"]


@fails("grouping")
class SharesRates(Around):
    def before(self) -> None:
        self._set(1 / len(self.param_groups))

    def after(self) -> None:
        self._set(len(self.param_groups))

    def _set(self, factor: float) -> None:
        for group in self.param_groups:
            group["lr"] = group["lr"] * factor


@fails("added_groups")
class ForgetsNewGroups(PlainAdamW):
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for group in self.param_groups[1:] if self.state else ():
            group["lr"] = 0.0


@fails("frozen")
class LeavesOutFrozen(PlainAdamW):
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        last = self.param_groups[-1]
        last["params"] = [p for p in last["params"] if p.requires_grad]


@fails("schedules", "tensor_rates")
class IgnoresSchedules(Around):
    def after(self) -> None:
        for group in self.param_groups:
            if group["lr"] != 0.0:
                group["lr"] = self.defaults["lr"]


@fails("first_rates")
class RemembersTheFirstRate(Around):
    def before(self) -> None:
        for group in self.param_groups:
            group["betas"] = (0.5 if self.defaults["lr"] == 1.0 else 0.9, 0.999)


@fails("tensor_rates")
class MakesRatesNumbers(PlainAdamW):
    def __init__(
        self, model: nn.Module, params: Any = None, lr: Any = 1e-2, **options: Any
    ) -> None:
        super().__init__(model, params, lr, **options)
        for group in self.param_groups:
            group["lr"] = float(group["lr"])


@fails("one_bound")
class ClimbsWithDecay(Around):
    def before(self) -> None:
        for group in self.param_groups:
            group["maximize"] = len(self.param_groups) > 1 and group["weight_decay"] == 5e-3
