"""The kernels of ``structured`` against their twins: interpreted on the CPU, or on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from structured import Dense, Diagonal, _dispatch, _gram

pytest.importorskip("triton")
from structured.kernels import _layout
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
    ],
)


@pytest.mark.parametrize("dtype", DTYPES)
@CASES
def test_sums_of_squares(shape, layout, dtype):
    X = matrix(shape, dtype, layout)
    found = squares.launch(X)
    assert_sum(found, X.double().square().sum(-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cut", [None, product.Tiling(16, 16, 4, 2)], ids=["default", "small"])
@CASES
def test_symmetric_product(shape, layout, cut, dtype):
    X = matrix(shape, dtype, layout)
    assert_sum(product.launch(X, cut), X.double() @ X.double().mT)


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
    twin = before.clone()
    _gram.add_symmetric_product_(twin, X, beta, 2.0)
    torch.testing.assert_close(twin, exact.float(), rtol=0, atol=0)


@pytest.mark.parametrize("tiles", [1, 2, 7, 8, 9, 16, 20])
def test_every_tile_has_its_number(tiles):
    """One column, one row of each tile: a product in which no tile is left out or repeated."""
    cut = product.Tiling(16, 16, 4, 2)
    X = torch.arange(1.0, 16 * tiles + 1, device=DEVICE)[:, None]
    out = torch.zeros(16 * tiles, 16 * tiles, device=DEVICE)
    product.launch_add(out, X, 1.0, 1.0, cut)
    assert torch.equal(out, X @ X.mT)


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
    """What PyTorch does with the operators, twin and kernel alike."""

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
        operator, twin = getattr(OPERATORS, name), getattr(_gram, name)
        each = torch.func.vmap(operator, in_dims=2)(X)
        torch.testing.assert_close(each, torch.func.vmap(twin, in_dims=2)(X))
        tangents = torch.func.jvp(operator, (X,), (X,))[1]
        torch.testing.assert_close(tangents, 2 * twin(X))
        slopes = torch.func.vmap(torch.func.grad(lambda x: operator(x).sum()))(X)
        expected = torch.func.vmap(torch.func.grad(lambda x: twin(x).sum()))(X)
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

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Watch():
        X = torch.empty(6, 5, device="cuda")
        for structure in (Diagonal, Dense):
            assert structure.zeros(6, device="cuda").project_gram(X).device.type == "cuda"
            structure.zeros(6, device="cuda").gram()
        _dispatch.add_symmetric_product_(X.new_zeros(6, 6), X)
    names = [name.removeprefix("structured::") for name in seen if name.startswith("structured")]
    expected = ["sums_of_squares", *2 * ["symmetric_product"], "add_symmetric_product_"]
    assert names == expected


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("shape", [(768, 800), (769, 800), (2, 400, 1500)])
def test_products_by_panels(shape, trained):
    X = torch.randint(-3, 4, shape).float().requires_grad_(trained)
    assert _gram._panels_pay(X)
    found = _gram.symmetric_product(X)
    torch.testing.assert_close(found, X @ X.mT, rtol=0, atol=0)
    if trained:
        C = torch.randint(-3, 4, found.shape).float()
        (slope,) = torch.autograd.grad(found, X, C)
        torch.testing.assert_close(slope, (C + C.mT) @ X, rtol=0, atol=0)
