"""No step is skipped whatever the scale of inputs, targets and losses, or the rank of inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from singd import KFAC, SINGD
from tests.singd.runs import batches, mean_loss, mlp

INPUTS: dict[str, Callable[[], Tensor]] = {
    "huge": lambda: 1e4 * torch.randn(8, 4),
    "tiny": lambda: 1e-6 * torch.randn(8, 4),
    "zero": lambda: torch.zeros(8, 4),
    "constant": lambda: torch.ones(8, 4),
    "far from zero": lambda: 1e5 + 1e3 * torch.randn(8, 4),
    "of rank one": lambda: torch.randn(8, 1) @ torch.ones(1, 4),
    "one sample, repeated": lambda: torch.randn(1, 4).expand(8, 4),
    "normal": lambda: torch.randn(8, 4),
}

SCALES: dict[str, tuple[float, float, float | None]] = {
    "raw targets": (1e6, 1.0, None),
    "a large loss": (1.0, 1e3, None),
    "a small loss": (1.0, 1e-6, None),
    "no damping": (1e4, 1.0, 0.0),
    "little damping": (1.0, 1e3, 1e-12),
}
"""Factors of targets and of the loss, and the damping."""


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [SINGD, KFAC])
def test_every_step_is_taken_and_descends(
    method: Any, dtype: torch.dtype, inputs: str, scale: str
) -> None:
    of_targets, of_loss, damping = SCALES[scale]
    model = mlp(dtype)
    options: dict[str, Any] = {} if damping is None else {"damping": damping}
    optimizer = method(model, lr=1e-3, T=1, **options)
    X, y = INPUTS[inputs]().to(dtype), (of_targets * batches(1)[0][1]).to(dtype)
    for _ in range(4):
        optimizer.zero_grad()
        (of_loss * mean_loss(model(X), y)).backward()
        gradients = [p.grad.double().clone() for p in model.parameters()]
        optimizer.precondition()
        directions = [p.grad.double() for p in model.parameters()]
        assert all(bool(d.isfinite().all()) for d in directions)
        pairs = zip(gradients, directions, strict=True)
        assert sum(float((g * d).sum()) for g, d in pairs) > 0.0
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad, alpha=1e-3)
    assert optimizer.skipped == 0


@pytest.mark.parametrize("method", [SINGD, KFAC])
def test_an_error_of_skipped_steps_names_the_parameter_and_the_cause(method: Any) -> None:
    model = mlp()
    optimizer = method(model, T=1, max_skipped=2)
    X, y = batches(1)[0]
    X[1, 2] = torch.nan

    def train() -> None:
        for _ in range(2):
            optimizer.zero_grad()
            mean_loss(model(X), y).backward()
            optimizer.step()

    with pytest.raises(
        FloatingPointError, match=r"0\.weight: its gradient is not finite in 2 step"
    ):
        train()
