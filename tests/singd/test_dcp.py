"""torch.distributed.checkpoint: fresh and used optimizers, alone and on two ranks."""

from __future__ import annotations

import copy
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

import singd
from singd.testing.sharded.world import spawn_within
from tests.singd.paper import KFAC, SINGD
from tests.singd.runs import batches, mlp, snapshot, train

F32 = torch.float32
DATA = batches(6, dtype=F32)
METHODS: dict[str, Any] = {
    "INGD": lambda m: SINGD(m, T=2, lr=0.05),
    "without momentum": lambda m: SINGD(m, T=2, lr=0.05, momentum=0.0),
    "SINGD": lambda m: SINGD(
        m, T=2, alpha1=0.5, lr=0.05, structures={"0*": ("hierarchical(1, 2)", "diagonal")}
    ),
    "bfloat16": lambda m: SINGD(m, T=2, preconditioner_dtype=(torch.bfloat16, None)),
    "24 and 8 bits": lambda m: SINGD(
        m, T=2, alpha1=0.5, preconditioner_dtype=("bfloat16+8", "int8")
    ),
    "KFAC": lambda m: KFAC(m, T=2, lr=0.05),
}


def net() -> nn.Sequential:
    return nn.Sequential(*mlp(F32), nn.LayerNorm(3))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def save(path: Path, model: nn.Module, optimizer: Any, options: StateDictOptions) -> None:
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=path)


def load(path: Path, model: nn.Module, optimizer: Any, options: StateDictOptions) -> None:
    weights, state = get_state_dict(model, optimizer, options=options)
    saved = {"model": weights, "optimizer": state}
    dcp.load(saved, checkpoint_id=path)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=saved["model"],
        optim_state_dict=saved["optimizer"],
        options=options,
    )


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("method", METHODS)
def test_a_saved_run_goes_on(method: str, used: bool, flat: bool, tmp_path: Path) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, other = net(), net()
    optimizer = METHODS[method](model)
    train(model, optimizer, DATA[:3])
    save(tmp_path, model, optimizer, options)
    loading = METHODS[method](other)
    if used:
        train(other, loading, DATA[::-1])
    load(tmp_path, other, loading, options)
    assert same(snapshot(other, loading), snapshot(model, optimizer))
    assert same(train(other, loading, DATA[3:]), train(model, optimizer, DATA[3:]))


@pytest.mark.parametrize("method", METHODS)
def test_looking_at_a_fresh_optimizer_changes_nothing(method: str) -> None:
    model, other = net(), net()
    optimizer, looked_at = METHODS[method](model), METHODS[method](other)
    state = get_optimizer_state_dict(other, looked_at)
    assert {name for name, p in other.named_parameters()} == state["state"].keys()
    assert all(p.grad is None for p in other.parameters())
    assert [g.get("step", 0) for g in looked_at.param_groups] == [0]
    assert all(
        torch.equal(p, q) for p, q in zip(other.parameters(), net().parameters(), strict=True)
    )
    set_optimizer_state_dict(other, looked_at, state)
    assert same(train(other, looked_at, DATA), train(model, optimizer, DATA))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_state_before_any_step_is_still_one_when_loaded(tmp_path: Path) -> None:
    """As accelerate loads it, to move it to a device: PyTorch makes a state where there is none."""
    model, other = net(), net()
    optimizer, loading = METHODS["SINGD"](model), METHODS["SINGD"](other)
    train(model, optimizer, DATA[:3])
    save(tmp_path, model, optimizer, StateDictOptions())
    loading.load_state_dict(loading.state_dict())
    assert not loading.state
    load(tmp_path, other, loading, StateDictOptions())
    assert same(train(other, loading, DATA[3:]), train(model, optimizer, DATA[3:]))


def test_a_step_with_a_rate_of_zero_is_a_step() -> None:
    """A warm-up from zero, unlike the step that only makes state."""
    model = net()
    optimizer = SINGD(model, T=1, lr=0.0, adamw={"lr": 0.0})
    train(model, optimizer, DATA[:1])
    assert optimizer.param_groups[0]["step"] == 1
    assert float(optimizer.state[model[3].weight]["step"]) == 1
    assert not torch.equal(optimizer.state[model[0].weight]["K"][0], torch.eye(5))


def test_another_model_is_refused(tmp_path: Path) -> None:
    model, other = net(), nn.Sequential(*mlp(F32), nn.LayerNorm(3))
    other[2] = nn.Linear(6, 3, bias=False)
    optimizer = SINGD(model, T=1)
    train(model, optimizer, DATA[:2])
    state = get_optimizer_state_dict(model, optimizer)
    loading = SINGD(other, T=1)
    train(other, loading, DATA[:1])
    before = snapshot(other, loading)
    state["state"]["2.weight"]["K"] = {0: torch.eye(6)}
    state["state"]["0.weight"]["K"] = {0: torch.eye(6)}
    with pytest.raises(ValueError, match=r"0\.weight: expected K of shape \[\[5, 5\]\]"):
        set_optimizer_state_dict(other, loading, state)
    assert same(snapshot(other, loading), before)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("momenta", [(0.9, 0.0), (0.0, 0.9)])
def test_biases_in_a_group_of_their_own(tmp_path: Path, momenta: tuple[float, float]) -> None:
    def make() -> tuple[nn.Module, Any]:
        model = net()
        named = list(model.named_parameters())
        groups = [
            {"params": [p for name, p in named if name.endswith(kind)], "momentum": momentum}
            for kind, momentum in zip(("weight", "bias"), momenta, strict=True)
        ]
        return model, SINGD(model, groups, T=2, lr=0.05)

    model, optimizer = make()
    train(model, optimizer, DATA[:3])
    save(tmp_path, model, optimizer, StateDictOptions())
    expected = train(model, optimizer, DATA[3:])
    model, optimizer = make()
    load(tmp_path, model, optimizer, StateDictOptions())
    assert same(train(model, optimizer, DATA[3:]), expected)


# Two ranks ---------------------------------------------------------------------------------------


def worker(rank: int, folder: str) -> None:
    """One of two ranks: save, load afresh in two ways, go on; leave what it ends with."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=30),
    )
    data = [(X[rank::2], y[rank::2]) for X, y in DATA]
    plain, ended = StateDictOptions(), {}
    whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)

    def make() -> tuple[nn.Module, Any]:
        model = DistributedDataParallel(net())
        return model, METHODS["SINGD"](model)

    model, optimizer = make()
    train(model, optimizer, data[:3])
    save(Path(folder, "saved"), model, optimizer, plain)
    full = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=whole))
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    used = copy.deepcopy(optimizer.state_dict())
    ended["whole"] = train(model, optimizer, data[3:])

    model, optimizer = make()
    load(Path(folder, "saved"), model, optimizer, plain)
    ended["loaded"] = train(model, optimizer, data[3:])

    model, optimizer = make()
    if rank == 0:  # so that its partner alone makes state, and must not wait for anybody
        optimizer.load_state_dict(used)
    model.load_state_dict(weights)
    set_optimizer_state_dict(model, optimizer, full if rank == 0 else {}, options=whole)
    ended["broadcast"] = train(model, optimizer, data[3:])
    torch.save(ended, Path(folder, str(rank)))
    del model, optimizer  # DistributedDataParallel must not outlive the group
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks(tmp_path: Path) -> None:
    spawn_within(120, worker, (str(tmp_path),), 2)
    runs = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    for ended in runs:
        assert same(ended["loaded"], ended["whole"])
        assert same(ended["broadcast"], ended["whole"])
    assert same(runs[0]["whole"], runs[1]["whole"])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_structures_that_were_chosen_are_given_to_the_fresh_optimizer(tmp_path: Path) -> None:
    ends = []
    for stopped in (False, True):
        model = net()
        optimizer = singd.SINGD(model, structures="auto")
        train(model, optimizer, DATA[:4])
        if stopped:
            save(tmp_path, model, optimizer, StateDictOptions())
            chosen, model = optimizer.param_groups[0]["structures"], net()
            optimizer = singd.SINGD(model, structures=chosen)
            load(tmp_path, model, optimizer, StateDictOptions())
        ends.append(train(model, optimizer, DATA[4:]))
    assert same(*ends)
