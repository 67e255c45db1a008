"""AdamW with a fault in its step."""

from __future__ import annotations

from typing import Any

import torch

from tests.singd.broken.plain import RAW_STEP, Around, PlainAdamW, fails


@fails("learns", "schedules", "one_bound", "mixed_dtypes")
class Climbs(PlainAdamW):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, maximize=True, **options)


@fails("without_gradients", "some_gradients", "frozen", "closures")
class DecaysWithoutGradient(Around):
    def before(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    p.detach().mul_(1 - 1e-3 * group["weight_decay"])


@fails("zero_gradients", "own_decays")
class MovesAtZero(Around):
    def after(self) -> None:
        for p in self.all():
            if p.grad is not None and not p.grad.is_sparse and not p.grad.any():
                p.detach().add_(1e-3 if p.ndim > 1 else 0.0)


@fails("gradients_stay")
class ScalesGradients(Around):
    def after(self) -> None:
        for p in self.all():
            if p.grad is not None:
                p.grad.mul_(1.0)


@fails("resetting", "without_gradients")
class AlwaysResetsToZero(PlainAdamW):
    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none=False)


@fails("empty_parameters")
class LooksAtTheLargest(Around):
    def before(self) -> None:
        for p in self.all():
            if p.grad is not None and not p.grad.is_sparse:
                p.grad.abs().max()


@fails("closures")
class CallsClosuresTwice(Around):
    def step(self, closure: Any = None) -> Any:
        if closure is not None:
            closure()
        return super().step(closure)


@fails("contexts")
class LooksAtTheContext(PlainAdamW):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["betas"] = (0.9 if torch.is_grad_enabled() else 0.8, 0.999)
        return RAW_STEP(self, closure)


@fails("random_numbers")
class DrawsNumbers(Around):
    def before(self) -> None:
        torch.rand(1)


@fails("mixed_dtypes")
class Widens(Around):
    def after(self) -> None:
        for p in self.all():
            if p.dtype == torch.float16:
                p.data = p.data.float()


@fails("defaults_of_torch")
class MakesTensorsAnywhere(Around):
    def before(self) -> None:
        for p in self.all():
            if p.grad is not None and not p.grad.is_sparse:
                p.grad + torch.zeros(())


@fails("memory_formats", "complex_parameters")
class ReadsMemoryAsItLies(PlainAdamW):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, fused=True, **options)


@fails("complex_parameters")
class DropsImaginaryParts(Around):
    def before(self) -> None:
        for p in self.all():
            if p.is_complex() and p.grad is not None:
                p.grad = p.grad.float().to(p.dtype)


@fails("scaled_gradients")
class SaysThatItUnscales(Around):
    _step_supports_amp_scaling = True


@fails("sparse_gradients")
class SkipsSparse(Around):
    def before(self) -> None:
        for p in self.all():
            if p.grad is not None and p.grad.is_sparse:
                p.grad = None
