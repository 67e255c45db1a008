"""A loss_average that is plainly wrong is reported; nothing else is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import singd
from tests.singd.paper import KFAC, SINGD

N, P, C = 6, 10, 5


def flat_ce(z: Tensor, y: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(z.flatten(0, -2), y.flatten(), **options)


def padded(z: Tensor, y: Tensor) -> Tensor:
    return flat_ce(z, y.masked_fill(torch.rand(y.shape) < 0.4, -100))


def per_sample(z: Tensor, y: Tensor) -> Tensor:
    return flat_ce(z, y, reduction="sum") / len(z)


def last(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z[:, -1], y[:, -1])


def total(z: Tensor, y: Tensor) -> Tensor:
    return flat_ce(z, y, reduction="sum")


def net(head: str) -> nn.Module:
    class Net(nn.Module):
        """Logits, ``[N, P, C]``."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(C, 8)
            self.body = nn.Linear(8, 8)
            self.head = nn.Conv1d(8, C, 1) if head == "conv" else nn.Linear(8, C, bias=False)
            if head == "tied":
                self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(self.embed(x)).tanh()
            return self.head(h.mT).mT if head == "conv" else self.head(h)

    return Net()


def said(
    loss: Callable[..., Tensor],
    loss_average: str | None,
    *,
    model: nn.Module | None = None,
    method: Any = SINGD,
    scaled: bool = False,
    micro: int = 1,
    shape: tuple[int, ...] = (N, P),
    terms: float = 0,
) -> list[str]:
    """The warnings of three steps."""
    model = net("linear") if model is None else model
    optimizer = method(model, T=1, loss_average=loss_average)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
    with warnings.catch_warnings(record=True, action="always") as caught:
        for _ in range(3):
            optimizer.zero_grad()
            for _ in range(micro):
                x, y = torch.randint(C, (2, *shape))
                scaler.scale(loss(model(x), y) / micro).backward()
            if terms:
                optimizer.count_terms(terms)
            scaler.step(optimizer)
            scaler.update()
    assert all(w.filename.endswith((__file__, "grad_scaler.py")) for w in caught)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("head", ["linear", "tied", "conv"])
@pytest.mark.parametrize("method", [SINGD, KFAC])
def test_a_mean_over_tokens_is_not_one_over_samples(head: str, method: Any) -> None:
    (message,) = said(flat_ce, "batch", model=net(head), method=method)
    assert "about 60 terms" in message
    assert "loss_average='batch' counts 6: set loss_average='batch+sequence'" in message
    assert said(flat_ce, "batch+sequence", model=net(head), method=method) == []


@pytest.mark.parametrize("graft", ["auto", "sgd", "adamw"])
@pytest.mark.parametrize("kfac_like", [False, True])
def test_it_does_not_matter_by_default_and_is_not_reported(graft: str, kfac_like: bool) -> None:
    """Damping and first factors are relative, directions have a length of their own."""

    def weights(loss_average: str | None) -> Tensor:
        torch.manual_seed(0)
        model = net("linear").double()
        method = partial(singd.SINGD, graft=graft, kfac_like=kfac_like)
        assert said(flat_ce, loss_average, model=model, method=method) == []
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    right = weights("batch+sequence")
    for wrong in ("batch", None):
        torch.testing.assert_close(weights(wrong), right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", [singd.KLShampoo, singd.SOAP])
def test_methods_of_gradients_have_no_such_option(method: Any) -> None:
    torch.manual_seed(0)
    model = net("linear")
    optimizer = method(model)
    x = torch.randint(C, (N, P))
    flat_ce(model(x), x).backward()
    with warnings.catch_warnings(action="error"):
        optimizer.step()


@pytest.mark.parametrize(
    "options",
    [{"graft": None}, {"kl_clip": 1e-3}, {"relative_damping": False}, {"scale_init": False}],
)
def test_where_it_matters_it_is_reported(options: dict[str, Any]) -> None:
    method = partial(singd.SINGD, **options)
    assert len(said(flat_ce, "batch", method=method)) == 1


@pytest.mark.parametrize("options", [{"scaled": True}, {"micro": 3}, {"scaled": True, "micro": 2}])
def test_neither_scaling_nor_accumulation_confuse_it(options: dict[str, Any]) -> None:
    assert len(said(flat_ce, "batch", **options)) == 1
    assert said(flat_ce, "batch+sequence", **options) == []
    assert said(per_sample, "batch", **options) == []


@pytest.mark.parametrize(
    ("loss", "wrong", "right"),
    [
        (padded, "batch", "batch+sequence"),
        (per_sample, "batch+sequence", "batch"),
        (last, "batch+sequence", "batch"),
        (flat_ce, None, "batch+sequence"),
        (per_sample, None, "batch"),
    ],
)
def test_every_wrong_setting(loss: Any, wrong: str | None, right: str) -> None:
    (message,) = said(loss, wrong)
    assert f"set loss_average={right!r}" in message
    assert said(loss, right) == []
    assert said(loss, wrong, terms=36.0) == []  # the number is given


def test_a_sum_is_a_sum() -> None:
    assert said(total, None) == []


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squares": lambda z, y: F.mse_loss(z, F.one_hot(y, C).float()),
    "binary": lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, C).float()),
    "margin": lambda z, y: F.multi_margin_loss(z.flatten(0, -2), y.flatten()),
    "smoothed": lambda z, y: flat_ce(z, y, label_smoothing=0.2),
    "class weights": lambda z, y: flat_ce(z, y, weight=torch.rand(C) + 0.1),
    "tempered": lambda z, y: flat_ce(3 * z, y),
    "pooled": lambda z, y: F.cross_entropy(z.mean(1), y[:, 0]),
    "sum of outputs": lambda z, y: z.sum(),
    "norm": lambda z, y: z.norm(),
    "kl": lambda z, y: F.kl_div(
        z.log_softmax(-1), torch.rand_like(z).softmax(-1), reduction="batchmean"
    ),
    "entropy": lambda z, y: (z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(),
    "mixture": lambda z, y: flat_ce(z, y) + 20 * z.square().mean(),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("loss_average", ["batch", "batch+sequence", None])
def test_other_losses_raise_no_alarm(name: str, loss_average: str | None) -> None:
    assert said(LOSSES[name], loss_average) == []


@pytest.mark.parametrize("loss_average", ["batch", "batch+sequence"])
def test_without_positions_both_settings_are_right(loss_average: str) -> None:
    assert said(flat_ce, loss_average, shape=(40,)) == []


def test_a_confident_model_is_read_as_well() -> None:
    """The size of the gradient says nothing then; its shape does."""
    model = net("linear")
    with torch.no_grad():
        model.head.weight.mul_(20)
    assert len(said(flat_ce, "batch", model=model)) == 1
    assert said(per_sample, "batch", model=model) == []


def test_nothing_stays_on_the_model() -> None:
    model = net("tied")
    optimizer = SINGD(model, loss_average="batch+sequence")
    x, y = torch.randint(C, (2, N, P))
    flat_ce(model(x), y).backward()
    optimizer.step()
    assert not model.head._forward_hooks
    assert not SINGD(model).close()
    assert not model.head._forward_hooks
