"""Parameter groups keep what they say, however parameters are sorted into them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from singd import KFAC, SINGD
from tests.singd.runs import F64, batches, mean_loss, mlp, snapshot, train

Groups = list[dict[str, Any]]

SORTED: dict[str, Callable[[list[Tensor]], Groups]] = {
    "biases first": lambda ps: [
        {"params": [p for p in ps if p.ndim < 2]},
        {"params": [p for p in ps if p.ndim > 1]},
    ],
    "each": lambda ps: [{"params": p} for p in ps],
    "each, reversed": lambda ps: [{"params": p} for p in ps[::-1]],
}


class Attends(nn.Module):
    """Attention with keys of another size; a bias of keys would have no gradient but rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Linear(4, 3)
        sizes = {"kdim": 3, "vdim": 3}
        self.attention = nn.MultiheadAttention(4, 2, bias=False, batch_first=True, **sizes)
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        keys = self.keys(x)
        y, _ = self.attention(x, keys, keys, need_weights=False)
        out: Tensor = self.out(self.norm(y)).mean(1)
        return out


def images() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()),
        *(nn.ConvTranspose2d(3, 3, 3, groups=3), nn.Flatten(), nn.Linear(108, 3)),
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "attention": (Attends, (5, 6, 4)),
    "images": (images, (5, 2, 4, 4)),
    "mlp": (mlp, (8, 4)),
}

SETTINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SINGD": (SINGD, {"kl_clip": 1e-2, "graft": None}),
    "all layers": (SINGD, {"kl_clip": 1e-2, "graft": None, "layers": "all"}),
    "grafted": (SINGD, {"kl_clip": None, "graft": "adamw", "T": 2}),
    "KFAC": (KFAC, {"kl_clip": 1e-2, "graft": None}),
}


def run(model: nn.Module, optimizer: Any, data: list[Any], step: str) -> list[Tensor]:
    sgd = torch.optim.SGD(model.parameters(), 0.01)
    for X, y in data:
        optimizer.zero_grad()
        mean_loss(model(X), y).backward()
        if step == "step":
            optimizer.step()
        else:
            optimizer.precondition()
            sgd.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("step", ["step", "precondition"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("model", MODELS)
def test_how_parameters_are_sorted_does_not_matter(model: str, setting: str, step: str) -> None:
    make, shape = MODELS[model]
    method, options = SETTINGS[setting]
    data = [(torch.randn(shape, dtype=F64), torch.randn(shape[0], 3, dtype=F64)) for _ in range(4)]
    ends = {}
    for name in ("one", *SORTED):
        torch.manual_seed(0)
        net = make().double()
        given = list(net.parameters())
        groups = [{"params": given}] if name == "one" else SORTED[name](given)
        optimizer = method(net, groups, **{"T": 1, "lr": 0.01, **options})
        ends[name] = run(net, optimizer, data, step)
    for name in SORTED:
        for a, b in zip(ends[name], ends["one"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_bias_at_twice_the_rate_of_its_weight_moves_twice_as_far() -> None:
    moves = []
    for factor in (1, 2):
        model = mlp()
        before = [p.detach().clone() for p in model.parameters()]
        weights, biases = ([p for p in model.parameters() if p.ndim == n] for n in (2, 1))
        groups = [{"params": weights}, {"params": biases, "lr": 0.01 * factor}]
        optimizer = SINGD(model, groups, lr=0.01, T=1, kl_clip=None, graft=None)
        train(model, optimizer, batches(1))
        moves.append([p.detach() - q for p, q in zip(model.parameters(), before, strict=True)])
    for place, (once, twice) in enumerate(zip(*moves, strict=True)):
        torch.testing.assert_close(twice, once * (1 + place % 2))


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_rate_of_zero_for_weights_or_for_biases_freezes_those(frozen: int) -> None:
    model = mlp()
    before = [p.detach().clone() for p in model.parameters()]
    groups: Groups = SORTED["biases first"](list(model.parameters()))
    groups[frozen] |= {"lr": 0.0, "weight_decay": 0.1}
    train(model, SINGD(model, groups, lr=0.05, T=1), batches(3))
    stayed = [torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert stayed == [(p.ndim == 1) == (frozen == 0) for p in before]


# Groups that are changed --------------------------------------------------------------------------


def sort(groups: Groups) -> None:
    groups.sort(key=lambda group: -group["lr"])


def move_a_bias(groups: Groups) -> None:
    groups[0]["params"].append(groups[1]["params"].pop(0))


def merge(groups: Groups) -> None:
    groups[0]["params"] += groups.pop(1)["params"]


@pytest.mark.parametrize("change", [sort, move_a_bias, merge])
def test_a_parameter_follows_the_group_that_it_is_in(change: Callable[[Groups], None]) -> None:
    model = mlp()
    weights, biases = ([p for p in model.parameters() if p.ndim == n] for n in (2, 1))
    groups = [{"params": weights, "lr": 0.01}, {"params": biases, "lr": 0.02}]
    optimizer = SINGD(model, groups, T=1, momentum=0.0, kl_clip=None, graft=None)
    train(model, optimizer, batches(2))
    change(optimizer.param_groups)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.param_groups[0]["lr"] = 0.01
    moving = set(optimizer.param_groups[0]["params"])
    before = {p: p.detach().clone() for p in model.parameters()}
    train(model, optimizer, batches(3)[2:])
    assert {p for p in before if not torch.equal(p, before[p])} == moving


def test_taking_a_parameter_of_another_model_is_an_error() -> None:
    model, other = mlp(), mlp()
    optimizer = SINGD(model, T=1)
    optimizer.param_groups[0]["params"][0] = other[0].weight
    with pytest.raises(ValueError, match="param_groups: expected the parameters"):
        train(model, optimizer, batches(1))  # noticed in the pass, or in the step


# Parameters that are new --------------------------------------------------------------------------


def replace_the_head(model: nn.Sequential) -> None:
    model[2] = nn.Linear(6, 3, dtype=F64)


def add_a_parameter(model: nn.Sequential) -> None:
    model.scale = nn.Parameter(torch.ones(()))


def parametrize(model: nn.Sequential) -> None:
    nn.utils.parametrizations.weight_norm(model[0])


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (replace_the_head, "2.weight, 2.bias"),
        (add_a_parameter, "scale"),
        (parametrize, "0.parametrizations.weight.original0, 0.parametrizations.weight.original1"),
    ],
)
def test_parameters_that_are_new_in_the_model_are_named_once(change: Any, names: str) -> None:
    model = mlp()
    optimizer = SINGD(model, T=1, lr=0.05)
    train(model, optimizer, batches(1))
    change(model)
    with warnings.catch_warnings(record=True, action="always") as caught:
        for X, y in batches(2):
            optimizer.zero_grad()
            mean_loss(model(X), y).backward()
            optimizer.step()
    (warning,) = caught
    assert str(warning.message).startswith(f"{names}: new in the model")
    assert warning.filename == __file__


def test_nothing_is_said_of_new_parameters_that_are_frozen_or_in_a_group() -> None:
    model = mlp()
    optimizer = SINGD(model, model[0].parameters(), T=1, lr=0.05)
    train(model, optimizer, batches(1))
    model[1] = nn.Sequential(nn.Tanh(), nn.Linear(6, 6, dtype=F64).requires_grad_(False))
    model.append(nn.Linear(3, 3, dtype=F64))
    optimizer.add_param_group({"params": list(model[3].parameters())})
    train(model, optimizer, batches(2))
    assert "K" in optimizer.state[model[3].weight]


def test_parameters_that_thaw_and_were_not_given_are_named_once() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = SINGD(model, T=1, lr=0.05)
    with warnings.catch_warnings(record=True, action="always") as caught:
        for step, (X, y) in enumerate(batches(4)):
            model[0].requires_grad_(step > 1)
            optimizer.zero_grad()
            mean_loss(model(X), y).backward()
            optimizer.step()
            assert len(caught) == (step > 1)
    (warning,) = caught
    assert str(warning.message).startswith("0.weight, 0.bias: new in the model, or no longer")
    optimizer.add_param_group({"params": list(model[0].parameters())})
    before = snapshot(model, optimizer)
    after = train(model, optimizer, batches(1))
    assert not torch.equal(after["0.weight"], before["0.weight"])
