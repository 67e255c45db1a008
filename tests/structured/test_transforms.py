"""Products: transforms by them and by FFT, their tables, and sums in place."""

import pytest
import scipy.fft
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.peak import PeakBytes
from structured import parse
from structured._core.numbers import tabulated
from structured._products import in_place, triangular
from structured._products.in_place import _PANEL, add_product_, panels, write_product_
from structured._transforms import autocorrelation, cosine
from structured._transforms.fft import factors

# n -> (p, q)
PRODUCTS = {
    24: (1, 24),
    37: (37, 1),
    62: (2, 31),
    96: (3, 32),
    66: (3, 22),
    512: (16, 32),
    1000: (40, 25),
}
PRODUCTS |= {2048: (64, 32)}
FFTS = {67: (67, 1), 785: (157, 5), 2080: (65, 32), 4096: (128, 32)}
BOUNDS = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def near(actual, expected, bound):
    scale = expected.abs().max()
    assert (actual.double() - expected).abs().max() <= bound * scale


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("n", PRODUCTS | FFTS)
def test_cosine_transforms_against_scipy(n, dtype):
    C, X = parse("rotated(diagonal, cosine)")(n), normal(2, n, 3).to(dtype)
    forth = torch.from_numpy(scipy.fft.dct(X.double().numpy(), norm="ortho", axis=-2))
    back = torch.from_numpy(scipy.fft.idct(X.double().numpy(), norm="ortho", axis=-2))
    near(C.unrotate(X), forth, BOUNDS[dtype])
    near(C._rotate(X), back, BOUNDS[dtype])
    near(C._rotate(X.mT.contiguous().mT), back, BOUNDS[dtype])


def test_which_cosine_transforms_are_products():
    X = torch.ones(1)
    for n, sizes in (PRODUCTS | FFTS).items():
        assert factors(n, cosine._LARGEST[1]) == sizes
        assert cosine._by_product(sizes[0], X) is (n in PRODUCTS)
    assert not cosine._by_product(1, X.to("meta"))


@pytest.mark.parametrize("columns", [0, 3, 200, 256, 300])
@pytest.mark.parametrize("n", [131, 160, 510, 900])
def test_autocorrelation(n, columns, monkeypatch):
    """By FFT and by product, whole and by parts."""
    X = normal(2, n, columns)
    sums = autocorrelation.diagonal_sums(X @ X.mT)
    monkeypatch.setattr(autocorrelation, "_FEWEST", 1)
    torch.testing.assert_close(autocorrelation.autocorrelation(X), sums)
    torch.testing.assert_close(autocorrelation._by_fft(X, 2 * n), sums)
    for spec in ("lower_toeplitz", "circulant"):
        A = parse(spec)(n, dtype=torch.float64)
        (ours,), (theirs,) = (B.tensors() for B in (A.project_gram(X), A.project(X @ X.mT)))
        torch.testing.assert_close(ours, theirs)


def test_which_autocorrelations_are_products(monkeypatch):
    """Of many columns, at sizes with factors."""

    def count(n, columns, **options):
        calls.clear()
        autocorrelation.autocorrelation(torch.ones(n, columns), **options)
        return len(calls)

    calls, by_fft = [], autocorrelation._by_fft
    monkeypatch.setattr(autocorrelation, "_by_fft", lambda *of: calls.append(of) or by_fft(*of))
    assert count(512, 127) == count(4096, 128) == count(131, 128) == 1
    assert count(512, 128) == count(2048, 128) == count(100, 128) == 0
    assert count(4096, 128, cyclic=True) == count(131, 128, cyclic=True) == 0
    assert count(257, 128, cyclic=True) == 1


@pytest.mark.parametrize("spec", ["rotated(diagonal, cosine)", "block_circulant(4)"])
@pytest.mark.parametrize("mode", [torch.inference_mode, FakeTensorMode])
def test_tables_made_in_a_mode_serve_outside(spec, mode):
    n = 88 if mode is FakeTensorMode else 92  # sizes that no other test has
    with mode():
        parse(spec)(n).apply(torch.ones(n, 1))
    A, X = parse(spec).identity(n), torch.ones(n, 1, requires_grad=True)
    A.apply(X).sum().backward()
    torch.testing.assert_close(X.grad, torch.ones(n, 1))


@pytest.mark.parametrize("spec", ["rotated(diagonal, cosine)", "lower_toeplitz", "circulant"])
def test_products_compile_for_any_size(spec):
    """Sizes may change: PyTorch then has symbols for them."""
    torch.compiler.reset()
    project = torch.compile(lambda A, X: A.project_gram(X), fullgraph=True, backend="eager")
    for n in (132, 144, 160):
        A, X = parse(spec)(n), normal(n, 130, dtype=torch.float32)
        torch.testing.assert_close(project(A, X).trace(), A.project_gram(X).trace())


@pytest.mark.parametrize("spec", ["lower_toeplitz", "circulant", "block_circulant(2)"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_empty_batches_compile(spec, dtype):
    torch.compiler.reset()
    A = parse(spec)(64, batch_shape=(0,), dtype=dtype)
    product = torch.compile(lambda A, B: A.matmul(B), fullgraph=True, backend="eager")(A, A)
    assert product.dtype == dtype
    assert [t.shape for t in product.tensors()] == [t.shape for t in A.tensors()]


def test_a_table_is_made_once_for_each_size_and_dtype():
    calls = []

    @tabulated
    def table(n):
        calls.append(n)
        return torch.arange(n).numpy(), torch.ones(n, dtype=torch.float64).numpy()

    for _ in range(2):
        for dtype in (torch.float32, torch.float64):
            whole, real = table(3, dtype=dtype)
            assert (whole.dtype, real.dtype) == (torch.int64, dtype)
    assert calls == [3, 3]


@pytest.mark.parametrize("batch", [(), (3,), (1, 3), (2, 3)])
@pytest.mark.parametrize(("beta", "alpha"), [(0.0, 1.0), (0.0, 2.0), (1.0, 1.0), (3.0, 2.0)])
def test_products_added_in_place(batch, beta, alpha):
    A, B, C = (normal(*batch, *core) for core in [(4, 2), (2, 5), (4, 5)])
    out = torch.full_like(C, torch.nan) if beta == 0 else C.clone()
    add_product_(out, A, B, beta=beta, alpha=alpha)
    torch.testing.assert_close(out, beta * C + alpha * (A @ B))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_below_float32_no_product_is_summed_in_place(batch, dtype):
    """PyTorch's kernels for it take a hundred times as long on a CPU if anything is transposed."""
    names = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    A, out = torch.ones(*batch, 256, 256, dtype=dtype), torch.ones(*batch, 256, 256, dtype=dtype)
    for beta in (0.0, 1.0):
        with Watch():
            add_product_(out, A, A, beta=beta)
        assert (out == 256 * (1 + beta)).all()
    assert bool({"addmm_", "baddbmm_"} & set(names)) is (dtype == torch.float32)


def test_large_products_are_added_without_a_temporary():
    A, out = torch.ones(2, 2, 256, 256), torch.zeros(2, 2, 256, 256)
    with PeakBytes() as count:
        count.add([A, out])
        add_product_(out, A, A)
    assert count.largest == 0
    assert torch.equal(out, A @ A)


_MANY = _PANEL // 8  # numbers of 8 bytes


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ((0, 2, 5), 1),
        ((7, 2, 5), 1),
        ((8, 2, _MANY // 4), 4),
        ((8, 2, _MANY // 6), 3),
        ((3, 2, _MANY), 3),
        ((2, 3, 2, 7), 1),
        ((2, 3, 2, _MANY // 2), 6),
        ((2, 8, 2, _MANY // 4), 8),
        ((8, 2, 2, _MANY // 8), 4),
    ],
)
def test_panels_fit_into_a_cache(shape, count):
    """Along the batch, in order, as many items as fit and one at least."""
    X = torch.arange(torch.Size(shape).numel()).reshape(shape)  # int64
    A = X[..., :2].expand(*shape[:-1], 2)
    first, second = zip(*panels(A, X), strict=True)
    assert len(first) == count
    assert all(len(x) == 1 or x.nbytes <= _PANEL for x in second)
    for pieces, whole in ((first, A), (second, X)):
        assert torch.equal(torch.cat([piece.reshape(-1) for piece in pieces]), whole.reshape(-1))
    assert len(list(panels(A.to("meta"), X.to("meta")))) == 1


@pytest.mark.parametrize("panel", [8, 100, _PANEL])
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_products_written_panel_by_panel(monkeypatch, batch, by_columns, panel):
    monkeypatch.setattr(in_place, "_PANEL", panel)
    A, B = normal(*batch, 4, 4), normal(*batch, 4, 5)
    B = B.mT.contiguous().mT if by_columns else B
    expected = A @ B
    out = torch.full_like(B, torch.nan)
    write_product_(out, A, B)
    torch.testing.assert_close(out, expected)
    spread = torch.full((7, *B.shape), torch.nan, dtype=B.dtype)
    write_product_(spread, A, B)  # of more batch dimensions than its factors
    torch.testing.assert_close(spread, expected.expand(7, *B.shape))
    write_product_(B, A, B)
    torch.testing.assert_close(B, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_are_written_in_the_order_of_their_place(dtype):
    """Else they would be transposed on the way, which takes longer than the product."""
    layouts = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ == "copy_":
                layouts.append(tuple(t.stride(-2) < t.stride(-1) for t in args[:2]))
            return func(*args, **(kwargs or {}))

    A, X = torch.ones(3, 4, 4, dtype=dtype), torch.ones(3, 6, 4, dtype=dtype)
    for B in (X.mT, X.mT.contiguous()):
        out = torch.empty_like(B)
        with Watch():
            write_product_(out, A, B)
    assert layouts == [(False, False)] * 2


@pytest.mark.parametrize("n", [7, 300, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_panels_of_a_triangular_gram_matrix(n, dtype):
    X = torch.randint(-3, 4, (n, 2), generator=torch.Generator().manual_seed(0)).to(dtype)
    for columns in (n, n // 2):
        out = torch.empty(n, columns, dtype=dtype)
        triangular.write_gram(out, X)
        assert torch.equal(out.tril(), (2 * X @ X[:columns].mT).tril())
