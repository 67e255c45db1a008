"""No step is skipped whatever the scale of inputs, targets and losses, or the rank of inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from singd import KFAC, SINGD, KLShampoo
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


FOLLOWING: dict[str, Any] = {
    "SINGD": SINGD,
    "SINGD, unbounded": partial(SINGD, factor_clip=None),
    "SINGD from identities": partial(SINGD, scale_init=False),
    "SINGD with momenta": partial(SINGD, alpha1=0.5),
    "IKFAC": partial(SINGD, kfac_like=True),
    "KL-Shampoo": partial(KLShampoo, T=1),
}
"""Methods whose factors grow by a part of themselves where a curvature is less than they say."""


@pytest.mark.parametrize("tiny", [0.0, 1e-20])
@pytest.mark.parametrize("method", FOLLOWING)
def test_factors_of_a_layer_without_gradients_stay_until_there_are_some(
    method: str, tiny: float
) -> None:
    model = mlp(torch.float32)
    optimizer = FOLLOWING[method](model)

    def train(slope: float) -> list[Tensor]:
        """The factors of the output gradients of the first layer after a step."""
        X, y = batches(1, dtype=torch.float32)[0]
        hidden = model[0](X)
        hidden.register_hook(lambda g: slope * g)  # as of units that do not react
        optimizer.zero_grad()
        mean_loss(model[1:](hidden), y).backward()
        optimizer.step()
        entry = optimizer.state[model[0].weight]
        return [t.clone() for t in entry["K_0" if method == "KL-Shampoo" else "C"]]

    first, *_, last = (train(tiny) for _ in range(3))
    torch.testing.assert_close(last, first, rtol=0, atol=0)
    torch.testing.assert_close(last, [torch.eye(6).expand_as(t) for t in last], rtol=0, atol=0)
    assert not torch.equal(train(1.0)[0], last[0])
    assert optimizer.skipped == 0


def test_a_channel_without_gradients_keeps_none_of_the_others_from_being_trained() -> None:
    model = nn.Conv2d(3, 3, 2, groups=3)
    optimizer = SINGD(model, T=1, lr_cov=1.0)
    for _ in range(120):  # factors that double every other step would be out of range
        optimizer.zero_grad()
        output = model(torch.randn(4, 3, 4, 4))
        output[:, 1:].square().sum((1, 2, 3)).mean().backward()
        optimizer.step()
    assert optimizer.skipped == 0
    assert all(bool(t.isfinite().all()) for t in optimizer.state[model.weight]["C"])
