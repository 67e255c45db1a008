"""The kernels of ``structured`` against their references: interpreted on the CPU, or on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from structured import Dense, Diagonal, kernels
from structured._core import dispatch
from structured._products import gram

pytest.importorskip("triton")
import triton
import triton.language as tl

from structured.kernels import _layout, guard
from structured.kernels import sums_of_squares as squares
from structured.kernels import symmetric_product as product

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPERATORS = torch.ops.structured


def assert_sum(found: Tensor, exact: Tensor) -> None:
    """Of integers: exact but for the rounding of the result."""
    cut = DEVICE.type == "cpu" and found.dtype == torch.bfloat16  # what the interpreter does
    rtol = torch.finfo(torch.bfloat16).eps if cut else 0.0
    torch.testing.assert_close(found, exact.to(found.dtype), rtol=rtol, atol=0)


def matrix(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    """Of small integers, so that sums are exact in float32, in one of several layouts."""
    torch.manual_seed(sum(shape))
    *batch, n, m = shape
    if layout == "columns":
        X = torch.randint(-3, 4, (*batch, m, n)).mT
    elif layout == "sliced":
        X = torch.randint(-3, 4, (*batch, 2 * n, 3 * m))[..., ::2, 1::3]
    elif layout == "batch last":
        X = torch.randint(-3, 4, (n, m, *batch)).permute(*range(2, len(shape)), 0, 1)
    else:
        X = torch.randint(-3, 4, shape)
    return X.to(dtype).to(DEVICE)


CASES = pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((1, 1), "rows"),
        ((5, 3), "columns"),
        ((40, 130), "rows"),
        ((130, 40), "columns"),
        ((33, 17), "sliced"),
        ((3, 30, 70), "rows"),
        ((2, 3, 18, 35), "batch last"),
        ((2, 1, 2, 2, 5, 9), "columns"),
        ((20, 5000), "rows"),
        ((20, 5000), "columns"),
        ((2, 2, 2, 5, 9), "rows"),
        ((3, 9000), "rows"),
        ((2, 3, 5000), "rows"),
        ((4, 300), "columns"),
    ],
)


@pytest.mark.parametrize("dtype", DTYPES)
@CASES
def test_sums_of_squares(shape, layout, dtype):
    X = matrix(shape, dtype, layout)
    found = squares.launch(X)
    assert found.dtype == dtype
    assert_sum(found, X.double().square().sum(-1))


@pytest.mark.parametrize(
    ("cut", "dtype"),
    [*((None, dtype) for dtype in DTYPES), (product.Tiling(16, 16, 4, 2), torch.bfloat16)],
)
@CASES
def test_symmetric_product(shape, layout, cut, dtype):
    X = matrix(shape, dtype, layout)
    found = product.launch(X, cut)
    assert found.dtype == dtype
    assert_sum(found, X.double() @ X.double().mT)


@pytest.mark.parametrize("shape", [(33, 20), (3, 17, 40), (20, 5000)])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_sums_of_symmetric_products_in_place(shape, beta):
    X = matrix(shape, torch.bfloat16, "columns")
    before = torch.randint(-3, 4, (shape[-2], *shape[:-1]), device=DEVICE).float().movedim(0, -1)
    before = before + before.mT  # contiguous in another order than its dimensions
    out = before.clone()
    product.launch_add(out, X, beta, 2.0)
    exact = beta * before.double() + 2 * X.double() @ X.double().mT
    torch.testing.assert_close(out, exact.float(), rtol=0, atol=0)
    plain = before.clone()
    gram.add_symmetric_product_(plain, X, beta, 2.0)
    torch.testing.assert_close(plain, exact.float(), rtol=0, atol=0)


@pytest.mark.parametrize("tiles", [1, 2, 7, 8, 9, 16, 20])
def test_every_tile_has_its_number(tiles):
    """One column, one row of each tile: a product in which no tile is left out or repeated."""
    cut = product.Tiling(16, 16, 4, 2)
    X = torch.arange(1.0, 16 * tiles + 1, device=DEVICE)[:, None]
    out = torch.zeros(16 * tiles, 16 * tiles, device=DEVICE)
    product.launch_add(out, X, 1.0, 1.0, cut)
    assert torch.equal(out, X @ X.mT)


@triton.jit
def _numbers(rows, columns, places, tiles, ROWS: tl.constexpr, COUNT: tl.constexpr):
    """What the kernel of the product makes of many places at once."""
    ramp = tl.arange(0, COUNT)
    if ROWS:
        tl.store(rows + ramp, product._row_of(tl.load(places + ramp)))
    else:
        i, j = product._tile_of(tl.load(places + ramp), tiles, product.BAND)
        tl.store(rows + ramp, i)
        tl.store(columns + ramp, j)


def test_rows_of_a_triangle():
    """Beside every hundredth row's ends, to where int32 ends; float32 is off by one there."""
    row = torch.cat([torch.arange(1, 1000), torch.arange(1000, 46_300, 100)])
    first = row * (row + 1) // 2
    place = torch.cat([first - 1, first, first + 1])
    expected = torch.cat([row - 1, row, row])
    count = triton.next_power_of_2(len(place))
    places = torch.zeros(count, dtype=torch.int32, device=DEVICE)
    places[: len(place)] = place
    rows = torch.empty_like(places)
    _numbers[(1,)](rows, rows, places, 0, ROWS=True, COUNT=count)
    assert torch.equal(rows[: len(place)].cpu(), expected.int())


@pytest.mark.parametrize("tiles", [1, 2, 7, 8, 9, 16, 20, 40])
def test_numbers_of_tiles(tiles):
    """Every tile on or below the diagonal once, in bands of rows that go down their columns."""
    count = tiles * (tiles + 1) // 2
    padded = triton.next_power_of_2(count)
    places = torch.arange(padded, dtype=torch.int32, device=DEVICE).clamp(max=count - 1)
    rows, columns = torch.empty_like(places), torch.empty_like(places)
    _numbers[(1,)](rows, columns, places, tiles, ROWS=False, COUNT=padded)
    expected = []
    for first in range(0, tiles, product.BAND):
        band = range(first, min(first + product.BAND, tiles))
        expected += [(i, j) for j in range(first) for i in band]
        expected += [(i, j) for i in band for j in range(first, i + 1)]
    assert list(zip(rows[:count].tolist(), columns[:count].tolist(), strict=True)) == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 16, 17, 64, 65, 999])
def test_tilings_suit_the_device(n, dtype):
    """Powers of two, one tile for a small block, 64 KiB at most for each stage of a product."""
    size, depth, warps, _ = product.tiling(n, dtype)
    assert all(value == triton.next_power_of_2(value) for value in (size, depth, warps))
    assert size >= min(n, 64)
    assert 16 <= depth * dtype.itemsize <= 256
    assert 2 * size * depth * dtype.itemsize <= 1 << 16


@pytest.mark.parametrize("columns", [20, 5000])
def test_what_is_replaced_does_not_matter(columns):
    X = matrix((33, columns), torch.float32, "rows")
    for add in (product.launch_add, gram.add_symmetric_product_):
        out = torch.full((33, 33), torch.nan, device=DEVICE)
        add(out, X, 0.0, 2.0)
        assert torch.equal(out, 2 * X @ X.mT)


def test_parts_fill_the_device_and_cover_the_columns(monkeypatch):
    monkeypatch.setattr(_layout, "_processors", lambda device: 100)
    part = _layout.parts(10_000, 10, 64, DEVICE, least=4)
    assert part % 64 == 0
    assert -(-10_000 // part) == 20
    assert _layout.parts(10_000, 500, 64, DEVICE, least=4) >= 10_000
    assert _layout.parts(10_000, 1, 64, DEVICE, least=40) == 40 * 64
    assert _layout.parts(10, 1, 64, DEVICE, least=40) == 64


@pytest.mark.parametrize("name", ["sums_of_squares", "symmetric_product"])
class TestOperator:
    """What PyTorch does with the operators, reference and kernel alike."""

    @pytest.mark.parametrize("shape", [(3, 7, 5), (0, 4), (4, 0), (0, 3, 4)])
    @pytest.mark.parametrize("trained", [False, True])
    def test_opcheck(self, name, shape, trained):
        X = torch.randn(shape, device=DEVICE, requires_grad=trained)
        torch.library.opcheck(getattr(OPERATORS, name).default, (X,))

    def test_gradients(self, name):
        X = torch.randn(2, 4, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
        operator = getattr(OPERATORS, name)
        assert torch.autograd.gradcheck(operator, X, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(operator, X)

    def test_transforms(self, name):
        X = torch.randn(2, 4, 3, device=DEVICE)
        operator, plain = getattr(OPERATORS, name), getattr(gram, name)
        each = torch.func.vmap(operator, in_dims=2)(X)
        torch.testing.assert_close(each, torch.func.vmap(plain, in_dims=2)(X))
        tangents = torch.func.jvp(operator, (X,), (X,))[1]
        torch.testing.assert_close(tangents, 2 * plain(X))
        slopes = torch.func.vmap(torch.func.grad(lambda x: operator(x).sum()))(X)
        expected = torch.func.vmap(torch.func.grad(lambda x: plain(x).sum()))(X)
        torch.testing.assert_close(slopes, expected)

    def test_compiles_whole(self, name):
        X = torch.randn(4, 3, device=DEVICE)
        operator = getattr(OPERATORS, name)
        compiled = torch.compile(lambda X: 2 * operator(X), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(X), 2 * operator(X))


def test_opcheck_in_place():
    arguments = (torch.zeros(3, 7, 7, device=DEVICE), torch.randn(3, 7, 5, device=DEVICE), 1.0, 2.0)
    torch.library.opcheck(OPERATORS.add_symmetric_product_.default, arguments)


def test_on_cuda_the_operators_are_called():
    """Seen by the dispatcher alone, on a device that need not exist."""
    seen: list[str] = []
    shapes: list[torch.Size] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            if seen[-1].startswith("structured"):
                shapes.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Watch():
        X = torch.empty(6, 5, device="cuda")
        for structure in (Diagonal, Dense):
            assert structure.zeros(6, device="cuda").project_gram(X).device.type == "cuda"
            structure.zeros(6, device="cuda").gram()
        dispatch.add_symmetric_product_(X.new_zeros(6, 6), X)
    names = [name.removeprefix("structured::") for name in seen if name.startswith("structured")]
    expected = ["sums_of_squares", *2 * ["symmetric_product"], "add_symmetric_product_"]
    assert names == expected
    assert shapes[-1] == (6, 6)


def test_what_the_kernels_serve():
    assert kernels._is_served(torch.ones(1, 1))
    assert not kernels._is_served(torch.ones(3, 0))
    assert not kernels._is_served(torch.ones(1, 1, dtype=torch.float64))
    assert guard.triton_is_installed()


def test_on_the_cpu_no_operator_is_called():
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert not func.name().startswith("structured"), func.name()
            return func(*args, **(kwargs or {}))

    with Watch():
        X = torch.ones(6, 5)
        dispatch.sums_of_squares(X)
        dispatch.symmetric_product(X)
        dispatch.add_symmetric_product_(torch.ones(6, 6), X)


@pytest.mark.parametrize("module", [dispatch, gram])
def test_sums_in_place_on_the_cpu(module):
    X = torch.arange(6.0).reshape(3, 2)
    out = torch.ones(3, 3, dtype=torch.float64)
    module.add_symmetric_product_(out, X)
    assert torch.equal(out, 1 + (X @ X.mT).double())
    module.add_symmetric_product_(out, X, 2.0, -1.0)
    assert torch.equal(out, 2 + (X @ X.mT).double())


@pytest.mark.parametrize(
    ("shape", "dtype", "pays"),
    [
        ((384, 1366), torch.float32, True),
        ((384, 1366), torch.float64, True),
        ((384, 1366), torch.bfloat16, False),
        ((384, 1365), torch.float32, False),
        ((383, 9999), torch.float32, False),
        ((512, 1024), torch.float32, True),
        ((768, 768), torch.float32, True),
        ((999, 998), torch.float32, False),
    ],
)
def test_where_products_by_panels_pay(shape, dtype, pays):
    assert gram._panels_pay(torch.empty(shape, dtype=dtype)) is pays
    assert not gram._panels_pay(torch.empty(shape, dtype=dtype, device="meta"))


def test_panels_do_five_eighths_of_the_work():
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        gram.symmetric_product(torch.empty(1024, 1024))
    assert counter.get_total_flops() == 2 * 1024**3 * 5 // 8


@pytest.mark.parametrize(
    ("shape", "dtype", "pays"),
    [
        ((256, 1024), torch.float32, True),
        ((2, 128, 1024), torch.float64, True),
        ((256, 1023), torch.float32, False),
        ((512, 1024), torch.bfloat16, False),
    ],
)
def test_where_norms_pay(shape, dtype, pays):
    X = torch.empty(shape, dtype=dtype)
    assert gram._norms_pay(X) is pays
    assert not gram._norms_pay(torch.empty(*shape[:-2], *shape[:-3:-1], dtype=dtype).mT)
    assert not gram._norms_pay(torch.empty(shape, dtype=dtype, requires_grad=True))
    assert not gram._norms_pay(torch.empty(shape, dtype=dtype, device="meta"))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("shape", [(768, 800), (769, 800), (2, 400, 1500)])
def test_products_by_panels(shape, trained):
    X = torch.randint(-3, 4, shape).float().requires_grad_(trained)
    assert gram._panels_pay(X)
    found = gram.symmetric_product(X)
    torch.testing.assert_close(found, X @ X.mT, rtol=0, atol=0)
    if trained:
        C = torch.randint(-3, 4, found.shape).float()
        (slope,) = torch.autograd.grad(found, X, C)
        torch.testing.assert_close(slope, (C + C.mT) @ X, rtol=0, atol=0)
