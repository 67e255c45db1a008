"""Steps of which the host reads one step later whether they were skipped, as on a GPU.

Here copies and events are plain.

What guards every write there is the same; the kernel that moves parameters is in ``tests/kernels``.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from singd.step import pipeline
from singd.step.skipping import SkippedSteps, reading_waits
from tests.singd.graphs import Graph
from tests.singd.paper import KFAC, SINGD
from tests.singd.runs import F64, batches, mean_loss, mlp, raw_bytes, snapshot, train

BAD = [float("nan"), float("inf")]
Pair = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def one_step_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all parameters were on a GPU."""
    monkeypatch.setattr(pipeline, "reading_waits", lambda parameters: True)


def network(dtype: torch.dtype = F64) -> nn.Sequential:
    return nn.Sequential(*mlp(dtype), nn.LayerNorm(3, dtype=dtype))


def broken(pair: Pair, value: float = float("nan")) -> list[Pair]:
    X = pair[0].clone()
    X[1, 2] = value
    return [(X, pair[1])]


def steps(optimizer: Any) -> list[int]:
    return [group["step"] for group in optimizer.param_groups if "step" in group]


def assert_same(got: Any, expected: Any) -> None:
    first, second = raw_bytes(got), raw_bytes(expected)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


METHODS: dict[str, Any] = {
    "dense": (SINGD, {}),
    "bare": (SINGD, {"kl_clip": None, "momentum": 0.0, "weight_decay": 0.1}),
    "momentum": (SINGD, {"alpha1": 0.5, "adamw": {"amsgrad": True, "weight_decay": 0.1}}),
    "diagonal": (SINGD, {"structures": ("diagonal", "diagonal"), "layers": "all"}),
    "blocks": (SINGD, {"structures": ("hierarchical(1, 1)", "block_diagonal(2)")}),
    "Toeplitz": (SINGD, {"structures": ("lower_toeplitz", "upper_toeplitz")}),
    "by SGD": (SINGD, {"graft": "sgd", "kl_clip": None}),
    "by AdamW": (SINGD, {"graft": "adamw", "kl_clip": None, "lr": 0.01}),
    "KFAC": (KFAC, {}),
    "KFAC by AdamW": (KFAC, {"graft": "adamw", "kl_clip": None, "lr": 0.01}),
}


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_with_bad_batches_is_the_run_without_them(
    method: str, dtype: torch.dtype, T: int, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, options = METHODS[method]
    runs = []
    for bad in (True, False):
        if not bad:
            monkeypatch.undo()  # the run without them is one that is read at once
        model = network(dtype)
        optimizer = kind(model, T=T, **{"lr": 0.05, **options})
        for index, pair in enumerate(batches(6, dtype=dtype)):
            for attempt in range(T if bad and index in (1, 3) else 0):  # updates stay due
                before = optimizer._parts.skipping.total
                train(model, optimizer, broken(pair, value))
                assert attempt or optimizer._parts.skipping.total == before
            train(model, optimizer, [pair])
        assert optimizer.skipped == (2 * T if bad else 0)
        assert steps(optimizer) == [6 + optimizer.skipped]
        runs.append(snapshot(model, optimizer))
    assert_same(*runs)


def test_a_step_that_is_read_later_reads_nothing() -> None:
    model = network(torch.float32)
    optimizer = SINGD(model, T=1)
    data = batches(4, dtype=torch.float32)
    train(model, optimizer, data[:3])
    assert optimizer.skipped == 0
    optimizer.zero_grad()
    mean_loss(model(data[3][0]), data[3][1]).backward()
    with Graph():
        optimizer.step()
    other = network(torch.float32)
    assert_same(snapshot(model, optimizer), train(other, SINGD(other, T=1), data))


@pytest.mark.parametrize("limit", [1, 2, 3, 0])
def test_the_limit_of_skipped_steps_is_of_steps_in_a_row(limit: int) -> None:
    model = network()
    optimizer = SINGD(model, T=1, max_skipped=limit)
    pair = batches(1)[0]
    for _ in range(2):
        for _ in range(limit - 1 if limit else 12):
            train(model, optimizer, broken(pair))
        train(model, optimizer, [pair])
    if limit:
        for _ in range(limit - 1):
            train(model, optimizer, broken(pair))
        with pytest.raises(FloatingPointError, match=rf"0\.weight: .* in {limit} steps in a row"):
            train(model, optimizer, broken(pair))
    assert optimizer.skipped == (3 * limit - 2 if limit else 24)


@pytest.mark.parametrize(
    "option",
    [{"max_skipped": 1}, {"adamw": {"foreach": True}}],
    ids=["limit", "AdamW"],
)
def test_what_cannot_be_later_is_read_at_once(option: dict[str, Any]) -> None:
    model = network()
    optimizer = SINGD(model, T=1, **option)
    before = train(model, optimizer, batches(2))
    try:
        train(model, optimizer, broken(batches(1)[0]))
    except FloatingPointError:
        assert option == {"max_skipped": 1}
    assert optimizer._parts.skipping.total == 1
    assert_same(snapshot(model, optimizer), before)


def test_large_numbers_are_finite() -> None:
    """Their squares are not; there is no second look."""
    runs = []
    for max_skipped in (10, 1):  # read later, and at once
        model = network(torch.float32)
        optimizer = SINGD(model, T=1, kl_clip=None, max_skipped=max_skipped)
        train(model, optimizer, batches(2, dtype=torch.float32))
        model[3].weight.grad.fill_(1e30)
        optimizer.step()
        assert optimizer.skipped == 0
        runs.append(snapshot(model, optimizer))
    assert_same(*runs)


# Between two steps --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
@pytest.mark.parametrize("T", [1, 3])
def test_what_is_saved_before_it_is_known_is_right(T: int, how: str) -> None:
    model, data = network(), batches(6)
    optimizer = SINGD(model, T=T, lr=0.05)
    train(model, optimizer, data[:3])
    before = snapshot(model, optimizer)
    train(model, optimizer, broken(data[3]))
    assert steps(optimizer) == [4]
    if how == "state_dict":
        other = copy.deepcopy(model)
        resumed = SINGD(other, T=T, lr=0.05)
        resumed.load_state_dict(optimizer.state_dict())
    elif how == "deepcopy":
        other, resumed = copy.deepcopy((model, optimizer))
    else:
        other, resumed = pickle.loads(pickle.dumps((model, optimizer)))
    assert steps(optimizer) == steps(resumed) == [4]
    assert optimizer.skipped == 1
    assert resumed.skipped == (how != "state_dict")
    assert_same(snapshot(other, resumed), before)
    assert_same(train(other, resumed, data[3:]), train(model, optimizer, data[3:]))


def test_a_state_is_loaded_before_it_is_known() -> None:
    model, data = network(), batches(4)
    optimizer = SINGD(model, T=2)
    expected = train(model, optimizer, data)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, broken(data[0]))
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert optimizer.skipped == 1
    assert steps(optimizer) == [4]
    assert_same(snapshot(model, optimizer), expected)


def factor(optimizer: Any, model: nn.Sequential) -> Tensor:
    return optimizer.state[model[0].weight]["K"][0].clone()


def test_an_update_that_a_skipped_step_has_cost_comes_T_steps_later() -> None:
    """Every attempt is counted, so a skip that is known one step later changes nothing else."""
    model, data = network(), batches(6)
    optimizer = SINGD(model, T=3)
    train(model, optimizer, data[:3])
    K = factor(optimizer, model)
    train(model, optimizer, broken(data[3]))
    for pair in data[4:6]:
        train(model, optimizer, [pair])
        assert torch.equal(factor(optimizer, model), K)
    train(model, optimizer, data[:1])
    assert not torch.equal(factor(optimizer, model), K)
    assert optimizer.skipped == 1


# A preconditioner ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kl_clip", [None, 1e-4])
def test_gradients_that_are_not_finite_stay(kl_clip: float | None) -> None:
    model, other, data = network(), network(), batches(3)
    optimizer, reference = (SINGD(m, T=1, kl_clip=kl_clip) for m in (model, other))

    def gradients(
        net: nn.Sequential, preconditioner: Any, pair: Pair, factor: float = 1.0
    ) -> tuple[Any, Any]:
        preconditioner.zero_grad()
        mean_loss(net(pair[0]), pair[1]).backward()
        net[2].bias.grad[0] *= factor
        before = [p.grad.clone() for p in net.parameters()]
        preconditioner.precondition()
        return before, [p.grad.clone() for p in net.parameters()]

    gradients(model, optimizer, data[0])
    before, after = gradients(model, optimizer, data[1], torch.inf)
    assert [bool(g.isfinite().all()) for g in before] == [True] * 3 + [False] + [True] * 2
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    gradients(model, optimizer, data[1])
    _, got = gradients(model, optimizer, data[2])
    assert optimizer.skipped == 1
    for pair in data:
        before, expected = gradients(other, reference, pair)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert not torch.equal(before[0], expected[0])


# Devices ------------------------------------------------------------------------------------------


def test_where_reading_waits() -> None:
    with FakeTensorMode():  # devices that need not exist
        cpu, first, second = (torch.empty(2, device=d) for d in ("cpu", "cuda:0", "cuda:1"))
    for params, expected in (
        ([first, first], True),
        ([cpu], False),
        ([first, second], False),
        ([first, cpu], False),
        ([], False),
    ):
        assert reading_waits(params) == expected


def test_the_copy_is_read_when_it_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    host, log = torch.tensor(False), []

    class Far:
        """A truth value on a device that need not exist: it says yes."""

        is_cuda, device = True, "cuda:3"

        def to(self, device: str, *, non_blocking: bool) -> Tensor:
            log.append(("to", device, non_blocking))
            return host

    class Event:
        def record(self, stream: Any) -> None:
            log.append(("record", stream))

        def synchronize(self) -> None:
            log.append("synchronize")
            host.fill_(True)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    skipping = SkippedSteps()
    far: Any = Far()
    skipping.defer(far, lambda: log.append("undo"))
    assert log == [("to", "cpu", True), ("record", "stream of cuda:3")]
    assert skipping.total == 0
    for _ in range(2):
        skipping.settle()
        assert log[2:] == ["synchronize", "undo"]
        assert (skipping.total, skipping.in_row) == (1, 1)
