"""Layers are read as matrix products: their rows give back autograd's gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from singd import Layer, register_layer
from singd.layers import LAYERS, OPTIONAL, base, find_layer
from singd.layers.base import flatten_rows, square_sums
from singd.testing import check_layer
from tests.singd.dense import relative
from tests.singd.paper import SINGD

law = settings(max_examples=60, deadline=None)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
F64 = torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize("shape", [(0, 2, 3), (5, 1, 3), (4, 6, 3), (2, 4, 6, 3), (3, 2, 4, 1, 7)])
def test_squares_are_summed_in_pieces_and_in_one_pass(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """The one on a CPU, the other on a GPU."""
    monkeypatch.setattr(base, "PIECE", 50)
    values = torch.randn(shape, dtype=F64).to(dtype)
    expected = values.double().square().sum((-3, -2))
    for found in (square_sums(values, "expand", average=True), base._in_one_pass(values)):
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


@law
@given(leading=st.lists(st.integers(1, 3), max_size=4), bias=st.booleans())
def test_linear_with_any_leading_dimensions(leading: list[int], bias: bool) -> None:
    check_layer(nn.Linear(4, 3, bias=bias, dtype=F64), torch.randn(*leading, 4, dtype=F64))


@st.composite
def convolutions(draw: Any) -> tuple[nn.Module, Tensor]:
    """Any convolution PyTorch has, with an input (sometimes without batch dimension)."""
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 4]))
    c_in, c_out = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, dilation = each(1, 4 if dims < 3 else 2), each(1, 2)
    padding = draw(st.sampled_from(["same", "valid", "numbers"]))
    stride = (1,) * dims if padding == "same" else each(1, 3)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    sizes = each(4, 8 if dims < 3 else 5)
    padding = each(0, 3 if dims < 3 else 2) if padding == "numbers" else padding
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    if padding == "valid":
        assume(all(span <= size for span, size in zip(spans, sizes, strict=True)))
    if padding not in ("same", "valid"):
        assume(all(s <= n + 2 * p for s, n, p in zip(spans, sizes, padding, strict=True)))
    module = getattr(nn, f"Conv{dims}d")(
        c_in,
        c_out,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
        dtype=F64,
    )
    batch = draw(st.sampled_from([(), (1,), (3,)]))
    return module, torch.randn(*batch, c_in, *sizes, dtype=F64)


@settings(max_examples=250, deadline=None)
@given(convolutions())
def test_convolutions(case: tuple[nn.Module, Tensor]) -> None:
    module, x = case
    try:
        with torch.no_grad():
            module(x)
    except RuntimeError:  # a padding PyTorch refuses
        assume(False)
    check_layer(module, x)


@pytest.mark.parametrize("kernel", [2, 4, (2, 3)])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_same_padding_of_even_kernels_is_uneven(kernel: Any, mode: str) -> None:
    conv = nn.Conv2d(2, 3, kernel, padding="same", padding_mode=mode, dtype=F64)
    check_layer(conv, torch.randn(2, 2, 5, 6, dtype=F64))


@law
@given(st.data())
def test_transposed_convolutions(data: st.DataObject) -> None:
    dims, groups = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1, 2]))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high)) for _ in range(dims))

    kernel, stride, dilation = each(1, 3), each(1, 3), each(1, 2)
    extra = tuple(
        data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
    )
    convolution = getattr(nn, f"ConvTranspose{dims}d")(
        2 * groups,
        3 * groups,
        kernel,
        stride=stride,
        padding=each(0, 1),
        output_padding=extra,
        dilation=dilation,
        groups=groups,
        dtype=F64,
    )
    batch = data.draw(st.sampled_from([(), (2,)]))
    check_layer(convolution, torch.randn(*batch, 2 * groups, *each(3, 4), dtype=F64))


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embeddings(padding_idx: int | None) -> None:
    embedding, x = nn.Embedding(5, 3, padding_idx, dtype=F64), torch.randint(5, (4, 6))
    check_layer(embedding, x)
    columns, rows = OPTIONAL[nn.Embedding].columns(embedding, x, "expand", ones=False)
    counts = torch.tensor([float((x == i).sum()) for i in range(5)], dtype=F64)
    if padding_idx is not None:
        counts[padding_idx] = 0
    torch.testing.assert_close((columns @ columns.mT).diagonal(), counts)
    assert rows == x.numel()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.LayerNorm(4, dtype=F64), (3, 4)),
        (nn.LayerNorm((2, 4), dtype=F64), (3, 5, 2, 4)),
        (nn.RMSNorm(4, dtype=F64), (3, 2, 4)),
        (nn.GroupNorm(2, 4, dtype=F64), (3, 4, 5)),
        (nn.BatchNorm1d(4, dtype=F64), (3, 4)),
        (nn.BatchNorm2d(4, dtype=F64), (3, 4, 2, 3)),
    ],
)
def test_normalizations(module: nn.Module, shape: tuple[int, ...], training: bool) -> None:
    check_layer(module.train(training), 2 + torch.randn(*shape, dtype=F64))


def test_a_layer_off_the_law_is_seen() -> None:
    class Unscaled(Layer):
        def grads(self, module: Any, g: Tensor) -> Tensor:
            return 2 * super().grads(module, g)

    class Flat(Layer):
        def inputs(self, module: Any, x: Tensor) -> Tensor:
            return super().inputs(module, x).flatten(-2)

    class Turned(Layer):
        def from_matrix(self, module: Any, matrix: Tensor) -> Tensor:
            return matrix.flip(0)

    class Summed(Layer):
        def inputs_along(self, module: Any, x: Tensor, u: Tensor) -> Tensor:
            return super().inputs_along(module, x, u).sum(-2, keepdim=True)

    class Opposite(Layer):
        def grads_along(self, module: Any, g: Tensor, v: Tensor) -> Tensor:
            return -super().grads_along(module, g, v)

    linear, x = nn.Linear(4, 3, dtype=F64), torch.randn(2, 5, 4, dtype=F64)
    for broken, law_broken in (
        (Unscaled(), "sum over rows of B"),
        (Flat(), "shape"),
        (Turned(), "from_matrix"),
        (Summed(), "inputs_along.*shape"),
        (Opposite(), "inputs_along.* grads_along"),
    ):
        with pytest.raises(AssertionError, match=law_broken):
            check_layer(linear, x, broken)
    with pytest.raises(TypeError, match="Bilinear"):
        check_layer(nn.Bilinear(3, 3, 2), torch.randn(2, 3))


# Rows --------------------------------------------------------------------------------------------


@law
@given(shape=st.tuples(*[st.integers(1, 4)] * 3), groups=st.integers(0, 2), average=st.booleans())
def test_expand_keeps_positions_and_reduce_takes_them_together(
    shape: tuple[int, ...], groups: int, average: bool
) -> None:
    N, P, d = shape
    values = torch.randn(*[groups] * bool(groups), N, P, d, dtype=F64)
    expanded = flatten_rows(values, "expand", average=average)
    assert expanded.shape[-2:] == (d, N * P)
    reduced = flatten_rows(values, "reduce", average=average)
    total = expanded.unflatten(-1, (N, P)).sum(-1)
    torch.testing.assert_close(reduced, total / P if average else total)
    if P == 1:
        assert torch.equal(expanded, reduced)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_the_constant_input_of_a_bias_is_one(approximation: str) -> None:
    values = torch.randn(2, 3, 4)
    rows = flatten_rows(values, approximation, average=True, ones=True)
    assert torch.equal(rows[:-1], flatten_rows(values, approximation, average=True))
    assert torch.equal(rows[-1], torch.ones_like(rows[-1]))


# The table ---------------------------------------------------------------------------------------


@pytest.fixture
def table() -> Iterator[None]:
    before = dict(LAYERS)
    yield
    LAYERS.clear()
    LAYERS.update(before)


def test_a_subclass_is_found_through_its_base() -> None:
    class MyLinear(nn.Linear):
        pass

    assert find_layer(MyLinear(2, 2)) is LAYERS[nn.Linear]
    assert find_layer(nn.BatchNorm1d(2)) is None


@pytest.mark.usefixtures("table")
def test_a_layer_of_your_own_is_preconditioned() -> None:
    """``x W`` in place of ``x W^T``: the transpose of a linear layer, and trained like one."""

    class Right(nn.Module):
        def __init__(self, d_in: int, d_out: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(d_in, d_out, dtype=F64))
            self.bias = None

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    class RightLayer(Layer):
        def shape(self, module: Any) -> tuple[int, ...]:
            d_in, d_out = module.weight.shape
            return d_out, d_in

        def to_matrix(self, module: Any, weight: Tensor) -> Tensor:
            return weight.mT

        def from_matrix(self, module: Any, matrix: Tensor) -> Tensor:
            return matrix.mT

    register_layer(Right, RightLayer())
    right, left = Right(4, 3), nn.Linear(4, 3, bias=False, dtype=F64)
    check_layer(right, torch.randn(5, 4, dtype=F64))
    left.load_state_dict({"weight": right.weight.detach().T.clone()})
    for model in (right, left):
        optimizer = SINGD(model, T=1, lr=0.1)
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            optimizer.zero_grad()
            output = model(torch.randn(8, 4, generator=generator, dtype=F64))
            output.square().sum(-1).mean().backward()
            optimizer.step()
    assert relative(right.weight.T, left.weight) < 1e-13


@pytest.mark.usefixtures("table")
def test_registration_names_what_it_expected() -> None:
    with pytest.raises(TypeError, match=r"expected a type of nn.Module, got .*Linear"):
        register_layer(nn.Linear(1, 1), Layer())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a Layer, got type"):
        register_layer(nn.Linear, Layer)  # type: ignore[arg-type]
