"""Factors in forms of fewer bits: they train, are saved, and take what is promised."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import singd
from benchmarks.peak import PeakBytes
from singd import convert
from singd.testing import check_method
from tests.singd.paper import SINGD
from tests.singd.runs import batches, distance, mean_loss, mlp, snapshot, train
from tests.singd.test_storage import BITS, F32, NAMES


def made(model: nn.Module, form: Any, **options: Any) -> SINGD:
    return SINGD(model, **{"T": 1, "lr": 0.05, "preconditioner_dtype": (form, form)} | options)


def net(seed: int = 0) -> nn.Sequential:
    """Equal layers, large enough that every factor is in the form."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 3))


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize(
    "law", ["descends", "no_statistics", "pure", "meta_shapes", "round_trip", "low_precision"]
)
def test_the_laws_of_methods(form: str, law: str) -> None:
    def make(model: nn.Module, params: Any) -> SINGD:
        return SINGD(model, params, T=2, alpha1=0.5, preconditioner_dtype=(form, form))

    check_method(make, laws=[law])


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("alpha1", [0.0, 0.5])
def test_what_is_stored_is_what_is_promised(form: str, alpha1: float) -> None:
    model = net()
    optimizer = made(model, form, structures=("dense", "dense"), alpha1=alpha1)
    train(model, optimizer, batches(2, dtype=F32))
    entry = optimizer.state[model[0].weight]
    for name, n in (("K", 25), ("C", 16), *((("m_K", 25), ("m_C", 16)) if alpha1 else ())):
        assert sum(t.nbytes for t in entry[name]) == BITS[form](n)
    assert all(b.stored.like.K.device.type == "meta" for b in optimizer._parts.store.batches)


def test_groups_of_one_and_of_many_have_the_same_factors() -> None:
    """To the bit, where nothing is summed but rows."""
    bare = {"kfac_like": True, "scale_init": False, "relative_damping": False}
    options: dict[str, Any] = bare | {"factor_clip": None, "structures": ("diagonal", "diagonal")}
    ends = []
    for grouped in (False, True):
        model = net()
        groups = [{"params": list(m.parameters())} for m in model] if grouped else None
        optimizer = made(model, "bfloat16+8", params=groups, lr=0.0, **options)
        train(model, optimizer, batches(5, dtype=F32))
        ends.append(read_factors(optimizer))
        assert len(optimizer._parts.store.batches) == (4 if grouped else 2)
    assert all(torch.equal(t, ends[1][name]) for name, t in ends[0].items())


@pytest.mark.parametrize("form", NAMES)
def test_steps_are_those_of_float32_nearly(form: str) -> None:
    bound = {"bfloat16+8": 1e-4, "int8": 0.05}[form]
    ends = []
    for each in (F32, form):
        model = net()
        optimizer = made(model, each)
        train(model, optimizer, batches(6, dtype=F32))
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    difference = float((ends[1] - ends[0]).norm() / ends[0].norm())
    assert 0.0 < difference < bound


@pytest.mark.parametrize("before", [F32, torch.bfloat16, *NAMES])
@pytest.mark.parametrize("after", [F32, torch.bfloat16, *NAMES])
@pytest.mark.parametrize("way", ["checkpoint", "group"])
def test_factors_go_on_in_another_form(before: Any, after: Any, way: str) -> None:
    """Within the rounding of the coarser one."""
    model, other = net(), net()
    optimizer = made(model, before, alpha1=0.5)
    train(model, optimizer, batches(3, dtype=F32))
    expected = read_factors(optimizer)
    if way == "checkpoint":
        state = optimizer.state_dict()
        for group in state["param_groups"]:
            group["preconditioner_dtype"] = (after, after)
        optimizer = made(other, after, alpha1=0.5)
        optimizer.load_state_dict(state)
    else:
        optimizer.param_groups[0]["preconditioner_dtype"] = (after, after)
    got = read_factors(optimizer)
    assert got.keys() == expected.keys()
    for name, t in expected.items():
        torch.testing.assert_close(got[name], t, rtol=0.004, atol=0.01 * float(t.abs().max()))
    assert optimizer.plan().state_bytes == sum(
        t.nbytes for name, t in snapshot(optimizer.model, optimizer).items() if "[" in name
    )
    train(optimizer.model, optimizer, batches(2, dtype=F32))


def read_factors(optimizer: SINGD) -> dict[str, Tensor]:
    """Copies of the numbers of all factors, in float32."""
    return {
        f"{each.matrix.key} {name} {i}": t.float().clone()
        for each in optimizer.stored_factors()
        for name, member in each.factors.members().items()
        for i, t in enumerate(member.tensors())
    }


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("spoil", ["one too many", "another type", "another shape"])
def test_a_checkpoint_in_no_form_is_an_error_and_changes_nothing(form: str, spoil: str) -> None:
    model = net()
    optimizer = made(model, form)
    train(model, optimizer, batches(2, dtype=F32))
    state, before = copy.deepcopy(optimizer.state_dict()), snapshot(model, optimizer)
    K = state["state"][0]["K"]
    if spoil == "one too many":
        K[2] = K[1]
    elif spoil == "another type":
        K[1] = K[1].to(torch.uint8)
    else:
        K[1] = K[1][:2]
    with pytest.raises(ValueError, match=r"0\.weight: expected K of shape .*, got"):
        optimizer.load_state_dict(state)
    assert distance(snapshot(model, optimizer), before) == 0.0


@pytest.mark.parametrize("form", NAMES)
def test_other_structures_and_trained_factors(form: str) -> None:
    model, other = net(), net()
    optimizer = made(model, form, structures=("lower_triangular", "diagonal"))
    train(model, optimizer, batches(3, dtype=F32))
    exported = singd.export(optimizer)["0.weight"].K
    stored = next(iter(optimizer.stored_factors())).factors.K
    assert torch.equal(exported.to_dense(), stored.to_dense())
    larger = made(other, form, structures=("dense", "dense"))
    larger.load_state_dict(convert.to_structures(larger, optimizer.state_dict()))
    got = next(iter(larger.stored_factors())).factors.K.to_dense()
    K = stored.to_dense()
    torch.testing.assert_close(got, K, rtol=0, atol=0.01 * float(K.abs().max()))


def test_text_and_tensors_keep_the_names_of_forms() -> None:
    model, other = net(), net()
    optimizer = made(model, "int8")
    train(model, optimizer, batches(2, dtype=F32))
    state = convert.from_tensors(*convert.to_tensors(optimizer.state_dict()))
    assert state["param_groups"][0]["preconditioner_dtype"] == ("int8", "int8")
    loaded = made(other, "int8")
    loaded.load_state_dict(state)
    assert all(torch.equal(t, read_factors(loaded)[k]) for k, t in read_factors(optimizer).items())


@pytest.mark.parametrize("form", NAMES)
def test_a_factor_that_is_not_finite_is_named(form: str) -> None:
    model = net()
    optimizer = made(model, form)
    train(model, optimizer, batches(2, dtype=F32))
    before = snapshot(model, optimizer)
    X, y = batches(1, dtype=F32)[0]
    optimizer.zero_grad()
    mean_loss(model(X), y).backward()
    optimizer.param_groups[0]["lr_cov"] = lambda _: float("nan")
    optimizer.step()
    assert optimizer.skipped == 1
    assert distance(snapshot(model, optimizer), before) == 0.0


def test_one_layer_after_the_other_is_read() -> None:
    """Between updates a step holds the numbers of one layer's factors at a time."""
    sizes = [40, 41, 42, 43, 44, 45, 46, 47, 48]
    peaks = []
    for form in (F32, "int8"):
        model = nn.Sequential(*(nn.Linear(*p, bias=False) for p in itertools.pairwise(sizes)))
        dense = {"structures": ("dense", "dense"), "keep_products": False}
        optimizer = made(model, form, T=100, momentum=0.0, **dense)
        for _ in range(2):
            optimizer.zero_grad()
            mean_loss(model(torch.randn(8, sizes[0])), torch.randn(8, sizes[-1])).backward()
            with PeakBytes() as count:
                optimizer.step()
        peaks.append(count.peak)
    numbers = 2 * 4 * sizes[-1] ** 2
    assert peaks[1] - peaks[0] < 2 * numbers  # of 8 layers


def test_it_is_made_of_what_the_option_says() -> None:
    model = mlp(F32)
    known = r"preconditioner_dtype: expected a floating-point dtype, 'bfloat16\+8', 'int8' or None"
    with pytest.raises(ValueError, match=known + ", got 'int4'"):
        SINGD(model, preconditioner_dtype=("bfloat16+8", "int4"))
