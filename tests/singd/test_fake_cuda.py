"""What steps on a GPU read and copy, without one; with one, tests/gpu says it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.fake_cuda import DEVICE, Shapes, backward, gpu, move, shapes
from singd.ops import cuda_graph
from tests.singd.paper import KFAC, SINGD

STRUCTURES = [
    "dense",
    "diagonal",
    "block_diagonal(7)",
    "block_circulant(2)",
    "circulant",
    "direct_sum(dense, upper_toeplitz, 5)",
    "hierarchical(3, 3)",
    "low_rank_lower(3)",
    "lower_toeplitz",
    "lower_triangular",
    "rotated(diagonal, cosine)",
    "rotated(dense, hadamard)",
    "scaled_identity",
    "transposed(lower_triangular)",
]
FEW = ["dense", "diagonal", "block_diagonal(7)", "hierarchical(3, 3)", "lower_toeplitz"]
OPTIONS: list[dict[str, Any]] = [
    {"alpha1": 0.5},
    {"alpha1": 0.5, "normalize_lr_cov": True},
    {"factor_clip": None},
    {"graft": "adamw"},
    {"graft": "sgd", "kl_clip": None},
    {"keep_products": False},
    {"kfac_like": True},
    {"layers": "all"},
    {"momentum": 0.0, "weight_decay": 0.1},
    {"preconditioner_dtype": (torch.float32, torch.bfloat16)},
    {"preconditioner_dtype": (torch.float16, torch.float16)},
]


def network(*, bias: bool = True, samples: int = 8) -> tuple[nn.Sequential, Shapes]:
    """Equal layers and others, and a normalization; and what they see."""
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Conv2d(2, 8, 3, bias=bias),
            nn.Conv2d(8, 8, 3, groups=2, bias=bias),
            nn.Flatten(),
            nn.Linear(32, 16, bias=bias),
            nn.LayerNorm(16),
            nn.Linear(16, 16, bias=bias),
            nn.Linear(16, 16, bias=bias),
        )
        return model, shapes(model, torch.empty(samples, 2, 6, 6))


def crossings(
    dtype: torch.dtype,
    method: Any = SINGD,
    rows: torch.dtype | None = None,
    before: Callable[[int, Any], set[str]] = lambda *_: set(),
    **options: Any,
) -> list[list[str]]:
    """The copies between host and device of every pass and step, in two periods of two.

    Args:
        dtype: Data type of the parameters.
        method: An optimizer.
        rows: Data type of what the layers see, if it is not ``dtype``, as under autocast.
        before: Function of the number of every pass and the optimizer: which layers it spares.
        options: Options of the optimizer.
    """
    found = []
    model, seen_by = network(bias="block_circulant" not in str(options))
    with gpu() as seen:
        move(model, dtype)
        optimizer = method(model, T=2, **options)
        for number in range(4):
            unused = before(number, optimizer)
            seen.found.clear()
            backward(optimizer, seen_by, rows or dtype, unused=unused)
            optimizer._parts.skipping._pending = None  # or it would be read
            optimizer.step()
            found.append(list(seen.found))
        state = [t for own in optimizer.state.values() for t in own.values() if t is not None]
        tensors = [t for value in state for t in ([value] if isinstance(value, Tensor) else value)]
        assert {t.device for t in tensors} == {DEVICE}
    return found


@pytest.mark.parametrize(
    ("structure", "dtype"),
    [(s, torch.bfloat16) for s in STRUCTURES] + [(s, torch.float32) for s in FEW],
    ids=str,
)
def test_a_step_leaves_one_number_for_the_next_and_waits_for_none(
    structure: str, dtype: torch.dtype
) -> None:
    found = crossings(dtype, structures=(structure, structure))
    assert found[2:] == [["to cpu"]] * 2


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_so_do_steps_with_other_options(options: dict[str, Any]) -> None:
    found = crossings(torch.bfloat16, structures=("hierarchical(3, 3)", "dense"), **options)
    assert found[2:] == [["to cpu"]] * 2


@pytest.mark.parametrize("method", [SINGD, KFAC])
def test_where_nothing_is_looked_at_nothing_is_copied(method: Any) -> None:
    assert crossings(torch.float32, method, max_skipped=None)[2:] == [[]] * 2


@pytest.mark.parametrize("structure", ["dense", "diagonal", "block_diagonal(7)", "lower_toeplitz"])
def test_so_do_steps_under_autocast(structure: str) -> None:
    found = crossings(torch.float32, rows=torch.bfloat16, structures=(structure, structure))
    assert found[2:] == [["to cpu"]] * 2


def test_so_do_steps_without_some_of_equal_layers() -> None:
    found = crossings(torch.float32, before=lambda *_: {"5"})
    assert found[2:] == [["to cpu"]] * 2


def test_kfac_leaves_one_number_for_the_next() -> None:
    assert crossings(torch.bfloat16, KFAC)[2:] == [["to cpu"]] * 2


@pytest.mark.parametrize("structure", [*FEW, "rotated(dense, hadamard)"])
def test_a_graph_records_no_copy_from_the_host(
    monkeypatch: pytest.MonkeyPatch, structure: str
) -> None:
    def before(number: int, optimizer: Any) -> set[str]:
        if number == 0:
            optimizer.param_groups[0]["lr"] = torch.empty((), device=DEVICE)
        if number == 2:
            monkeypatch.setattr(cuda_graph, "is_capturing", lambda: True)
        return set()

    options: dict[str, Any] = {"structures": (structure, structure), "max_skipped": None}
    assert crossings(torch.float32, before=before, **options)[2:] == [[]] * 2


@pytest.mark.parametrize("structure", ["dense", "diagonal", "block_diagonal(7)"])
def test_statistics_take_as_many_launches_for_many_samples_as_for_few(structure: str) -> None:
    """A GPU has no use for pieces that fit into a cache: each would wait for its launches."""
    counts = []
    for samples in (64, 4096):  # of 4096 the patches take 10 MB
        model, seen_by = network(samples=samples)
        with gpu() as seen:
            move(model, torch.float32)
            optimizer = SINGD(model, T=1, structures=(structure, structure))
            optimizer._ensure()
            seen.operators = 0
            backward(optimizer, seen_by, torch.float32)
            counts.append(seen.operators)
    assert counts[0] == counts[1]


COUNTED: list[dict[str, Any]] = [
    {},
    {"graft": "adamw"},
    {"adamw": {"capturable": True}},
    {"adamw": {"foreach": True}, "max_skipped": None},
]


@pytest.mark.parametrize("options", COUNTED, ids=str)
def test_counters_of_steps_follow_their_parameter(options: dict[str, Any]) -> None:
    """From a state that was loaded to the host, as most are."""
    model, seen_by = network()
    with gpu():
        move(model, torch.float32)
        optimizer = SINGD(model, **options)
        backward(optimizer, seen_by, torch.float32)
        optimizer.step()
        optimizer._parts.skipping._pending = None
        state = optimizer.state_dict()
        for own in state["state"].values():
            own |= {k: t.cpu() for k, t in own.items() if isinstance(t, Tensor)}
        optimizer.load_state_dict(state)
        backward(optimizer, seen_by, torch.float32)
        optimizer.step()
        counters = [own["step"] for own in optimizer.state.values() if "step" in own]
        assert len(counters) > 1
        assert {t.device for t in counters} == {DEVICE}
