"""AdamW with a fault in its state or its hooks."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.singd.broken.plain import Around, PlainAdamW, fails


@fails("there_is_state", "round_trips", "names", "resets", "copies", "hooks_of_loading")
class KeepsStateElsewhere(Around):
    own: dict[Any, Any] | None = None

    def before(self) -> None:
        if self.own is not None:
            self.state.update(self.own)

    def after(self) -> None:
        self.own = dict(self.state)
        self.state.clear()


@fails("looking", "other_models")
class CountsLooks(PlainAdamW):
    def state_dict(self) -> dict[str, Any]:
        for entry in self.state.values():
            entry["exp_avg"] = entry["exp_avg"] * 1.1
        return super().state_dict()


@fails("other_models")
class TakesAnyState(PlainAdamW):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        try:
            super().load_state_dict(state_dict)
        except ValueError:
            self.state.clear()


@fails("names")
class InsistsOnNames(PlainAdamW):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups = zip(self.param_groups, state_dict.get("param_groups", ()), strict=False)
        if any(("param_names" in a) != ("param_names" in b) for a, b in groups):
            return
        super().load_state_dict(state_dict)


@fails("other_dtypes")
class KeepsDataTypes(PlainAdamW):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for entry, saved in zip(
            self.state.values(), state_dict.get("state", {}).values(), strict=False
        ):
            entry.update(saved)


@fails("copies")
class CopiesWithoutState(PlainAdamW):
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "state": {}}  # type: ignore[misc]


@fails("hooks_of_steps")
class StepsInsideAStep(PlainAdamW):
    def __init__(self, model: nn.Module, params: Any = None, **options: Any) -> None:
        super().__init__(model, params, **options)
        PlainAdamW(model)  # from now on the step of that class runs hooks

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@fails("hooks_that_change_arguments")
class IgnoresNewArguments(PlainAdamW):
    def register_step_pre_hook(self, hook: Any) -> Any:
        def run(*args: Any) -> None:
            hook(*args)

        return super().register_step_pre_hook(run)


@fails("hooks_of_saving")
class AddsAfterHooks(PlainAdamW):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "version": 1}


@fails("hooks_of_loading")
class ReadsBeforeHooks(PlainAdamW):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({k: state_dict[k] for k in ("state", "param_groups")})


@fails("hooks_that_change_state")
class WritesAfterHooks(PlainAdamW):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for group, saved in zip(
            self.param_groups, state_dict.get("param_groups", ()), strict=False
        ):
            group["lr"] = saved["lr"]
