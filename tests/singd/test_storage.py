"""Numbers in forms of fewer bits: what is read is near what was written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from singd.ops.stochastic_rounding import Rounding
from singd.ops.storage import BLOCK, FORMS, PLAIN, Form, Plain, decode, form_of, recode, recognize

F32 = torch.float32
NAMES = list(FORMS)
BITS = {"bfloat16+8": lambda n: 3 * n, "int8": lambda n: n + 4 * -(-n // BLOCK)}
NUMBERS = st.one_of(
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.floats(-1.0, 1.0, width=32),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-149, -(2.0**-126), 2.0**127]),
)
ROWS = st.lists(NUMBERS, min_size=1, max_size=150)
ROUNDING = Rounding(3, 7)


def units(form: str, x: Tensor) -> Tensor:
    """The distance of neighbours at every number of a row, in float64."""
    if form == "bfloat16+8":
        exponent = x.double().abs().clamp(min=2.0**-126).log2().floor()
        return 2.0 ** (exponent - 15)
    largest = torch.stack([block.abs().max() for block in x.double().split(BLOCK)])
    return (largest / 127).repeat_interleave(BLOCK)[: len(x)]


def read(form: Form, x: Tensor, rounding: Rounding | None = None, name: str = "K") -> Tensor:
    """One row, written and read."""
    return form.decode(form.encode(x[None], rounding, [name]))[0]


# The forms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", NAMES)
@settings(max_examples=200, deadline=None)
@given(row=ROWS)
def test_what_is_read_is_within_half_a_unit(form: str, row: list[float]) -> None:
    """Within one where it was rounded by chance; float32 in between takes some more."""
    x = torch.tensor(row, dtype=F32)
    unit = units(form, x) * (1 + 1e-4) + 2.0**-140
    near, by_chance = (read(FORMS[form], x, r) for r in (None, ROUNDING))
    assert near.dtype == F32
    assert bool(((near.double() - x.double()).abs() <= unit / 2).all())
    assert bool(((by_chance.double() - x.double()).abs() <= unit).all())


@pytest.mark.parametrize("form", NAMES)
@settings(max_examples=50, deadline=None)
@given(row=ROWS)
def test_what_was_read_is_written_as_it_was(form: str, row: list[float]) -> None:
    """Numbers that a form has are kept, by chance as to nearest."""
    x = read(FORMS[form], torch.tensor(row, dtype=F32))
    if form == "int8":  # a code below one half of a unit of float32 is rounded in between
        x = torch.where(x.abs() < 2.0**-120, 0.0, x)
    assert torch.equal(read(FORMS[form], x), x)
    if form == "bfloat16+8":
        assert torch.equal(read(FORMS[form], x, ROUNDING), x)


@pytest.mark.parametrize("form", NAMES)
def test_rounding_by_chance_keeps_the_mean(form: str) -> None:
    """Within five standard errors, as a number is never off by more than a unit."""
    x, count = torch.randn(100, generator=torch.Generator().manual_seed(0)), 20_000
    names = [f"number {i}" for i in range(count)]
    got = FORMS[form].decode(FORMS[form].encode(x.expand(count, -1), ROUNDING, names)).double()
    unit = units(form, x)
    assert bool(((got.mean(0) - x.double()).abs() <= 5 * unit / count**0.5).all())
    assert float((got.std(0) > 0.1 * unit).double().mean()) > 0.8


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("rounding", [None, ROUNDING])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_not_hidden(form: str, rounding: Any, bad: float) -> None:
    """And says so in a real tensor: that is where a step looks."""
    x = torch.ones(3 * BLOCK)
    x[BLOCK + 5] = bad
    stored = FORMS[form].encode(x[None], rounding, ["K"])
    got = FORMS[form].decode(stored)[0]
    assert not any(bool(t.isfinite().all()) for t in stored if t.is_floating_point())
    if form == "int8":
        assert not bool(got[BLOCK : 2 * BLOCK].isfinite().any())
        x[BLOCK : 2 * BLOCK] = got[BLOCK : 2 * BLOCK] = 0.0
    torch.testing.assert_close(got, x, rtol=0, atol=0, equal_nan=True)


def test_the_extremes_of_float32() -> None:
    most, least = torch.finfo(F32).max, 2.0**-149
    for form in FORMS.values():
        assert torch.equal(read(form, torch.zeros(70)), torch.zeros(70))
        assert bool(read(form, torch.tensor([0.99 * most, -0.99 * most])).isfinite().all())
    assert torch.equal(read(FORMS["int8"], torch.tensor([most, least])), torch.tensor([most, 0.0]))
    assert not read(FORMS["bfloat16+8"], torch.tensor([255 * least])).sub(256 * least).any()


def test_the_bfloat16_alone_is_the_nearest() -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    high, low = FORMS["bfloat16+8"].encode(x[None], None, ["K"])
    assert bool(((high.float() - x).abs() <= x.abs() * 2.0**-8).all())
    assert low.min() >= -128
    assert float((high[0] == x.bfloat16()).double().mean()) > 0.99  # the others are between two


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 9, 9), (65,), (128,)])
def test_it_takes_the_bytes_that_are_promised(form: str, shape: tuple[int, ...]) -> None:
    for device in ("cpu", "meta"):
        stored = FORMS[form].encode(torch.ones(2, *shape, device=device), None, ["a", "b"])
        n = torch.Size(shape).numel()
        assert sum(t.nbytes for t in stored) == 2 * BITS[form](n)


@pytest.mark.parametrize("form", NAMES)
def test_items_side_by_side_are_stored_as_each_alone(form: str) -> None:
    """To the bit: the noise is that of the name and of the place in the item."""
    x = torch.randn(3, 9, 9, generator=torch.Generator().manual_seed(0))
    names = ["a", "b", "c"]
    together = FORMS[form].encode(x, ROUNDING, names)
    for i, name in enumerate(names):
        alone = FORMS[form].encode(x[i : i + 1], ROUNDING, [name])
        assert all(torch.equal(t[i], u[0]) for t, u in zip(together, alone, strict=True))
        assert torch.equal(
            FORMS[form].decode([t[i] for t in together]), FORMS[form].decode(alone)[0]
        )
    other = FORMS[form].encode(x, ROUNDING, ["a", "b", "d"])
    assert torch.equal(other[1][1], together[1][1])
    assert not torch.equal(other[1][2], together[1][2])


@settings(max_examples=50, deadline=None)
@given(
    kinds=st.lists(st.sampled_from([*NAMES, None]), min_size=1, max_size=4),
    sizes=st.lists(st.integers(2, 9), min_size=4, max_size=4),
    other=st.sampled_from([*NAMES, None]),
)
def test_forms_are_recognized(kinds: list[str | None], sizes: list[int], other: str | None) -> None:
    """By data types and shapes alone, in any order; and read in any other form."""
    xs = [torch.randn(n, n) for n, _ in zip(sizes, kinds, strict=False)]
    forms = [form_of(kind, x, 0) for kind, x in zip(kinds, xs, strict=True)]
    stored = [
        t[0] for f, x in zip(forms, xs, strict=True) for t in f.encode(x[None], ROUNDING, ["K"])
    ]
    found = recognize(stored, [x.shape for x in xs])
    assert found is not None
    assert [type(f) for f in found] == [type(f) for f in forms]
    assert recognize(stored[1:], [x.shape for x in xs]) is None
    assert recognize([*stored, stored[0]], [x.shape for x in xs]) is None
    wanted = [form_of(other, x, 0) for x in xs]
    again = decode(recode(stored, found, wanted), wanted)
    for got, expected, x in zip(again, decode(stored, forms), xs, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0.01 * float(x.abs().max()))


def test_few_numbers_stay_in_float32() -> None:
    """A diagonal that is rounded to zero would stay there."""
    assert isinstance(form_of("int8", torch.zeros(5), 5), Plain)
    assert form_of("int8", torch.zeros(5, 5), 5) is FORMS["int8"]
    assert form_of("bfloat16+8", torch.zeros(5), 5) is FORMS["bfloat16+8"]
    assert PLAIN.decode([torch.ones(2)]).dtype == F32
