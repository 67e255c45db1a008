"""Kernels that are broken on purpose fall back, with one warning, and training goes on.

They run under Triton's interpreter, so no GPU is needed: the CPU is made a device of kernels.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton
import triton.language as tl

from structured import kernels
from structured.kernels import Guarded, guard, integers, symmetric_product

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPERATORS = torch.ops.structured
DEFAULT = frozenset(guard.DEVICES)


@pytest.fixture(autouse=True)
def _kernels_serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(guard, "DEVICES", {"cpu", "cuda"})
    yield
    for kernel in kernels.GUARDED:
        kernel.found.clear()


@triton.jit
def _twice(x, out, size, RIGHT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < size)
    if RIGHT:
        value = 2 * value
    tl.store(out + i, value, mask=i < size)


@triton.jit
def _broken(x, out, size, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK == 0, "no such architecture")


def right(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    _twice[(1,)](x, out, len(x), RIGHT=True, BLOCK=64)
    return out


def wrong(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    _twice[(1,)](x, out, len(x), RIGHT=False, BLOCK=64)
    return out


def raises(x: Tensor) -> Tensor:
    _broken[(1,)](x, torch.empty_like(x), len(x), BLOCK=64)
    return x


def samples(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Iterator[tuple[Tensor]]:
    for n in (20, 64):
        yield (integers(n, bound=3, dtype=dtypes[0], device=device),)


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Any) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.function(*args)


def guarded(kernel: Any) -> Guarded:
    return Guarded("test::twice", Counted(kernel), Counted(lambda x: x + x), samples)


def numbers(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(-1, 1, 50, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_kernel_that_is_right_serves(dtype: torch.dtype) -> None:
    twice, x = guarded(right), numbers(dtype)
    for _ in range(3):
        assert torch.equal(twice(x), 2 * x)
    assert (twice.kernel.calls, twice.reference.calls) == (2 + 3, 2)
    (status,) = twice.status()
    assert status.serves
    assert str(status) == f"test::twice on {x.device} ({str(dtype)[6:]}): serves"


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [(wrong, "its numbers are not those of its reference"), (raises, "no such architecture")],
)
def test_one_that_is_broken_falls_back_for_good(kernel: Any, reason: str) -> None:
    twice, x = guarded(kernel), numbers()
    with pytest.warns(RuntimeWarning, match=f"test::twice on .*float32.*{reason}") as warned:
        assert torch.equal(twice(x), 2 * x)
    assert len(warned) == 1
    calls = twice.kernel.calls
    with warnings.catch_warnings(action="error"):
        for _ in range(2):
            assert torch.equal(twice(x), 2 * x)
    assert twice.kernel.calls == calls
    (status,) = twice.status()
    assert not status.serves
    assert re.fullmatch(rf"falls back to PyTorch: (\w+: .*)?{reason}\W*", status.reason)


def test_devices_and_data_types_are_checked_one_by_one() -> None:
    def not_in_16_bits(x: Tensor) -> Tensor:
        return right(x) if x.dtype == torch.float32 else wrong(x)

    twice = guarded(not_in_16_bits)
    assert torch.equal(twice(numbers()), 2 * numbers())
    with pytest.warns(RuntimeWarning, match="float16"):
        twice(numbers(torch.float16))
    assert [(s.dtypes, s.serves) for s in twice.status()] == [
        ((torch.float32,), True),
        ((torch.float16,), False),
    ]


def test_one_that_raises_after_its_check_falls_back_too() -> None:
    """A size that was not among the samples may need another compilation."""

    def small(x: Tensor) -> Tensor:
        if len(x) > 64:
            raise RuntimeError("out of resources: shared memory\nRequired: 7")
        return right(x)

    twice, large = guarded(small), torch.ones(65, device=DEVICE)
    assert torch.equal(twice(numbers()), 2 * numbers())
    with pytest.warns(RuntimeWarning, match="RuntimeError: Required: 7") as warned:
        assert torch.equal(twice(large), 2 * large)
    assert len(warned) == 1
    assert torch.equal(twice(numbers()), 2 * numbers())
    assert not twice.status()[0].serves


def test_an_error_of_the_device_s_memory_is_not_one_of_the_kernel() -> None:
    def hungry(x: Tensor) -> Tensor:
        if len(x) > 64:
            raise torch.OutOfMemoryError("no memory")
        return right(x)

    twice = guarded(hungry)
    with pytest.raises(torch.OutOfMemoryError):
        twice(torch.ones(65, device=DEVICE))
    assert twice.status()[0].serves

    def fails_in_the_check(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    other = guarded(fails_in_the_check)
    assert torch.equal(other(numbers()), 2 * numbers())
    assert not other.found  # checked at the next use


def test_threads_that_fail_together_warn_once() -> None:
    """As the threads of a backward pass, or of DataParallel, may."""
    barrier, large = threading.Barrier(2), torch.ones(65, device=DEVICE)

    def small(x: Tensor) -> Tensor:
        if len(x) > 64:
            barrier.wait(60)
            raise RuntimeError("no")
        return right(x)

    twice = guarded(small)
    twice(numbers())
    with pytest.warns(RuntimeWarning) as warned, ThreadPoolExecutor(2) as pool:
        found = list(pool.map(twice, [large, large]))
    assert len(warned) == 1
    assert all(torch.equal(x, 2 * large) for x in found)


def test_threads_that_begin_together_check_once() -> None:
    barrier = threading.Barrier(2)
    twice = guarded(right)

    def first_use(x: Tensor) -> Tensor:
        barrier.wait(60)
        return twice(x)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(first_use, [numbers(), numbers()]))
    assert all(torch.equal(x, 2 * numbers()) for x in found)
    assert (twice.kernel.calls, twice.reference.calls) == (2 + 2, 2)


def test_a_check_of_another_thread_counts() -> None:
    """One that was under way when this one had to wait."""
    twice = guarded(right)
    twice(numbers())
    assert twice._check(next(iter(twice.found)))
    assert twice.reference.calls == 2


def test_lists_count_by_their_first_item_and_empty_ones_not_at_all() -> None:
    def first(xs: list[Tensor], none: list[Tensor], places: list[int]) -> Tensor:
        return right(xs[0])

    def case(device: torch.device, dtypes: Any) -> Iterator[tuple[Any, ...]]:
        yield [next(samples(device, dtypes))[0]], [], [3]

    twice = Guarded("test::first", first, lambda xs, none, places: 2 * xs[0], case)
    x = numbers(torch.float16)
    assert torch.equal(twice([x], [], [3]), 2 * x)
    assert list(twice.found) == [(x.device, (torch.float16,))]
    assert twice.status()[0].serves


def test_data_types_that_are_asked_for_count() -> None:
    def case(device: torch.device, dtypes: Any) -> Iterator[tuple[Any, ...]]:
        yield next(samples(device, dtypes))[0], dtypes[-1]

    cast = Guarded("test::cast", lambda x, dtype: x.to(dtype), lambda x, dtype: x.to(dtype), case)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(cast(numbers(), dtype), numbers(dtype))
    assert [row.dtypes[1:] for row in cast.status()] == [(torch.float16,), (torch.bfloat16,)]


def test_how_a_status_reads() -> None:
    assert [str(row) for row in guarded(right).status()] == ["test::twice: not used yet"]
    cuda, dtypes = torch.device("cuda", 1), (torch.float32, torch.bfloat16)
    row = kernels.KernelStatus("test::twice", cuda, dtypes, "turned off")
    assert str(row) == "test::twice on cuda:1 (float32, bfloat16): turned off"


def test_other_devices_go_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(DEFAULT) == ["cuda"]
    monkeypatch.setattr(guard, "DEVICES", DEFAULT)
    twice = guarded(right)
    assert torch.equal(twice(torch.ones(3)), torch.tensor([2.0, 2.0, 2.0]))
    assert twice.kernel.calls == 0
    assert not twice.found


def test_what_is_written_in_place_is_compared_too() -> None:
    def careless(x: Tensor) -> Tensor:
        out = right(x)
        x.zero_()
        return out

    twice, x = guarded(careless), numbers()
    with pytest.warns(RuntimeWarning, match="numbers"):
        assert torch.equal(twice(x), 2 * numbers())
    assert torch.equal(x, numbers())


def test_the_check_draws_no_random_numbers_and_knows_no_autocast() -> None:
    def in_float64(X: Tensor) -> Tensor:  # which autocast leaves alone
        return (X.double() @ X.double()).to(X.dtype)

    twice = Guarded("test::square", in_float64, lambda X: X @ X, _squares)
    state = torch.random.get_rng_state()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        twice(torch.eye(3, device=DEVICE))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert twice.status()[0].serves


@pytest.mark.parametrize("bound", [1, 3, 50])
def test_the_integers_of_a_check_take_all_values(bound: int) -> None:
    values = integers(30, 40, bound=bound, dtype=torch.float32, device=DEVICE)
    assert values.shape == (30, 40)
    assert values.unique().tolist() == list(range(-bound, bound + 1))


def _squares(device: torch.device, dtypes: Any) -> Iterator[tuple[Tensor]]:
    yield (integers(40, 40, bound=9, dtype=dtypes[0], device=device),)


def test_a_variable_turns_all_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRUCTURED_KERNELS", "0")
    twice = guarded(raises)
    with warnings.catch_warnings(action="error"):
        assert torch.equal(twice(numbers()), 2 * numbers())
    assert twice.kernel.calls == 0
    (row,) = twice.status()
    assert str(row) == f"test::twice on {row.device} (float32): turned off by STRUCTURED_KERNELS=0"


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "triton_is_installed", lambda: False)
    twice = guarded(raises)
    assert torch.equal(twice(numbers()), 2 * numbers())
    assert twice.status()[0].reason == "Triton is not installed"


def test_a_graph_that_is_recorded_leaves_the_check_for_the_next_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    twice = guarded(right)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not twice._check((torch.device("cuda", 0), (torch.float32,)))
    assert twice.status()[0].reason == "not used yet"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernels_of_structured_pass(dtype: torch.dtype) -> None:
    X = integers(9, 30, bound=3, dtype=dtype, device=DEVICE)
    out = torch.ones(9, 9, device=DEVICE)
    with warnings.catch_warnings(action="error"):
        squares, product = OPERATORS.sums_of_squares(X), OPERATORS.symmetric_product(X)
        OPERATORS.add_symmetric_product_(out, X, 2.0, 1.0)
    exact = X.double() @ X.double().mT
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(squares.double(), exact.diagonal(), rtol=eps, atol=0)
    torch.testing.assert_close(product.double(), exact, rtol=eps, atol=0)
    assert torch.equal(out, 2 + exact.float())
    assert all(row.serves for row in kernels.status()), kernels.status()
    assert {row.kernel for row in kernels.status()} == {
        f"structured::{name}"
        for name in ("sums_of_squares", "symmetric_product", "add_symmetric_product_")
    }
    assert all(dtype in row.dtypes for row in kernels.status())


def zeros(X: Tensor) -> Tensor:
    return X.new_zeros(*X.shape[:-1], X.shape[-2])


@pytest.mark.parametrize("launch", [zeros, raises])
def test_an_operator_of_a_broken_kernel_is_right(
    launch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(symmetric_product, "launch", launch)
    X = integers(9, 30, bound=3, dtype=torch.float32, device=DEVICE)
    with pytest.warns(RuntimeWarning, match="structured::symmetric_product on ") as warned:
        found = [OPERATORS.symmetric_product(X) for _ in range(2)]
    assert len(warned) == 1
    assert all(torch.equal(product, X @ X.mT) for product in found)
    OPERATORS.sums_of_squares(X)
    assert [row.serves for row in kernels.status()] == [True, False, False]


@pytest.mark.parametrize("name", ["sums_of_squares", "symmetric_product"])
def test_float64_is_not_for_the_kernels(name: str) -> None:
    X = torch.ones(3, 4, dtype=torch.float64, device=DEVICE)
    getattr(OPERATORS, name)(X)
    assert {row.reason for row in kernels.status()} == {"not used yet"}
