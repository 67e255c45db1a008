"""The kernels of ``singd`` against their references: interpreted on the CPU, or on a GPU."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from singd.ops import reference
from singd.ops.momentum_step import momentum_step_
from singd.ops.reductions import inner_product
from singd.ops.reference import Indices
from singd.ops.stochastic_rounding import Rounding, name_keys, stochastic_round

pytest.importorskip("triton")
from singd.ops import kernels
from singd.ops.kernels import inner_products as inner_product_kernel
from singd.ops.kernels import rounding as rounding_kernel
from structured.kernels import guard

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LOW = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _kernels_serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As operators, on the CPU too; and none may fall back."""
    monkeypatch.setattr(guard, "DEVICES", {"cpu", "cuda"})
    yield
    assert all(row.serves or not row.device for row in kernels.status()), kernels.status()


def keys(*names: str, seed: int = 3, step: int = 0) -> tuple[Tensor, Tensor]:
    """What the noise of tensors of these names depends on."""
    return name_keys(names, DEVICE), Rounding(seed, step).word(DEVICE)


def rounded(x: Tensor, dtype: torch.dtype, *, name: str = "x", seed: int = 3) -> Tensor:
    flat = x.to(DEVICE).reshape(1, -1)
    return rounding_kernel.launch(flat, dtype, *keys(name, seed=seed), 0).view(x.shape)


@pytest.mark.parametrize("start", [0, 1, 6, 4099])
@pytest.mark.parametrize("n", [0, 1, 7, 5001])
@pytest.mark.parametrize("dtype", LOW)
def test_rounding_is_its_reference_to_the_bit(dtype: torch.dtype, n: int, start: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, n, device=DEVICE) * torch.logspace(-6, 3, n, device=DEVICE)
    names = ("a", "b", "c")
    found = rounding_kernel.launch(x.mT.contiguous().mT, dtype, *keys(*names), start)
    assert torch.equal(found, Rounding(3, 0).plain(x, dtype, names, Indices(start)))


@pytest.mark.parametrize("dtype", LOW)
def test_rounds_to_a_neighbour(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(5000, device=DEVICE) * torch.logspace(-3, 3, 5000, device=DEVICE)
    gap = torch.finfo(dtype).eps * 2.0 ** x.abs().clamp(min=torch.finfo(dtype).tiny).log2().floor()
    found = rounded(x, dtype)
    assert ((found.float() - x).abs() < gap).all()
    assert (found != x.to(dtype)).any()
    exact = x.to(dtype).float()
    assert torch.equal(rounded(exact, dtype).float(), exact)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("part", [0.1, 0.5, 0.75])
def test_rounding_has_no_bias(dtype: torch.dtype, part: float) -> None:
    """The share that is rounded up is the distance to the lower neighbour."""
    eps, count = torch.finfo(dtype).eps, 40_000
    x = torch.full((count,), 1 + part * eps, device=DEVICE)
    deviation = (part * (1 - part) / count) ** 0.5
    for found in (rounded(x, dtype), stochastic_round(x, dtype)):
        share = float((found.float() > 1).float().mean())
        assert abs(share - part) < 5 * deviation


def test_names_seeds_and_places_are_independent() -> None:
    x = torch.full((2, 5000), 1 + torch.finfo(torch.bfloat16).eps / 2, device=DEVICE)
    drawn = [{"name": "x"}, {"name": "y"}, {"name": "x", "seed": 7}]
    bits = [rounded(x, torch.bfloat16, **each) > 1 for each in drawn]
    rows = torch.cat(bits).double()
    assert (torch.corrcoef(rows) - torch.eye(6, device=DEVICE)).abs().max() < 0.08
    assert torch.equal(bits[0], rounded(x, torch.bfloat16) > 1)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # NumPy, in the interpreter
@pytest.mark.parametrize("dtype", LOW)
def test_what_is_not_finite_stays(dtype: torch.dtype) -> None:
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([nan, inf, -inf, 0.0, -0.0, 1e38])
    payload = torch.tensor([-1], dtype=torch.int32).view(torch.float32)
    torch.testing.assert_close(rounded(x[:5], dtype).cpu(), x[:5].to(dtype), equal_nan=True)
    assert rounded(payload, dtype).isnan().all()
    assert rounded(x, dtype)[-1] > 0


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_a_step_of_many_parameters(dtype: torch.dtype, momentum: float, decoupled: bool) -> None:
    """Sums may be ordered otherwise, and so end on the other side of a number of 16 bits."""
    torch.manual_seed(0)
    M = torch.randn(5, 8, device=DEVICE)  # a weight with its bias, side by side
    directions = [M[:, :-1].unflatten(1, (7, 1)), M[:, -1], torch.randn(3, 2, 4, device=DEVICE).mT]
    directions += [torch.randn(0, device=DEVICE), torch.randn(9000, device=DEVICE)]
    directions[-1] = directions[-1].to(dtype)
    params = [torch.randn(d.shape, device=DEVICE).to(dtype) for d in directions]
    buffers = [torch.randn_like(p) for p in params] if momentum else []
    mine = [[t.clone() for t in group] for group in (params, buffers)]
    before = [d.clone() for d in directions]
    names, numbers = [f"p{i}" for i in range(len(params))], (0.1, momentum, 0.01, decoupled)

    def plainly(x: Tensor, dtype: torch.dtype, index: int) -> Tensor:
        flat = Rounding(3, 0).plain(x.reshape(1, -1), dtype, names[index : index + 1])
        return flat.view(x.shape)

    kernels.momentum_step_(mine[0], directions, mine[1], *numbers, *keys(*names))
    reference.momentum_step_(params, directions, buffers, *numbers, plainly)
    eps = torch.finfo(dtype).eps
    for found, expected in zip(mine[0] + mine[1], params + buffers, strict=True):
        torch.testing.assert_close(found, expected, rtol=2 * eps, atol=2 * eps)
    if dtype in LOW:  # with the same noise
        assert (mine[0][-1] == params[-1]).double().mean() > 0.99
    for found, expected in zip(directions, before, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("devices", [{"cpu", "cuda"}, {}], ids=["kernel", "reference"])
def test_what_guards_a_step_keeps_all_or_nothing(
    dtype: torch.dtype, momentum: float, devices: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "DEVICES", devices)
    torch.manual_seed(0)
    params = [torch.randn(n, device=DEVICE).to(dtype) for n in (9000, 3)]
    buffers = [torch.randn_like(p) for p in params] if momentum else []
    directions = [torch.randn(p.shape, device=DEVICE) for p in params]
    bad = [torch.full_like(d, torch.nan) for d in directions]

    def step(along: list[Tensor], *unless: Tensor) -> list[Tensor]:
        moved = [p.clone() for p in params], along, [b.clone() for b in buffers]
        kernels.momentum_step_(*moved, 0.1, momentum, 0.01, False, *keys("p", "q"), *unless)
        return moved[0] + moved[2]

    no, yes = (torch.tensor(value, device=DEVICE) for value in (False, True))
    taken = step(directions, no)
    torch.testing.assert_close(taken, step(directions), rtol=0, atol=0)
    torch.testing.assert_close(step(bad, yes), params + buffers, rtol=0, atol=0)
    assert not torch.equal(taken[1], params[1])


@pytest.mark.parametrize("indices", [Indices(5), Indices(3, 40, 70), Indices(0, 1, 3)])
@pytest.mark.parametrize("dtype", LOW)
def test_a_part_of_a_parameter_has_the_noise_of_its_places(
    dtype: torch.dtype, indices: Indices, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    p, d = (torch.randn(3000, device=DEVICE) for _ in range(2))
    whole = [torch.zeros(9000, device=DEVICE), torch.zeros(9000, device=DEVICE)]
    at = indices.of(torch.arange(3000, device=DEVICE))
    whole[0][at], whole[1][at] = p, d
    numbers = 0.1, 0.0, 0.0, False
    parts, referred = [p.to(dtype)], [p.to(dtype)]
    wholes = [whole[0].to(dtype)]
    kernels.momentum_step_(wholes, whole[1:], [], *numbers, *keys("p"))
    kernels.momentum_step_(parts, [d], [], *numbers, *keys("p"), None, list(indices))
    monkeypatch.setattr(guard, "DEVICES", {})
    kernels.momentum_step_(referred, [d], [], *numbers, *keys("p"), None, list(indices))
    assert torch.equal(parts[0], wholes[0][at])
    assert (referred[0] == parts[0]).double().mean() > 0.99


def test_small_steps_add_up() -> None:
    """Steps far below a unit in the last place move a bfloat16 parameter as they should."""
    p, d = torch.ones(4000, device=DEVICE).bfloat16(), torch.ones(4000, device=DEVICE)
    for step in range(20):
        numbers = 1e-4, 0.0, 0.0, False
        kernels.momentum_step_([p], [d], [], *numbers, *keys("p", step=step))
    assert abs(float(p.double().mean()) - 0.998) < 2e-4


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_the_step_is_that_of_the_optimizer(dtype: torch.dtype) -> None:
    """So that what a GPU and what a CPU trains differ by rounding alone."""
    torch.manual_seed(0)
    p, d, b = (torch.randn(300, device=DEVICE).to(dtype) for _ in range(3))
    mine, buffer, options = p.clone(), b.clone(), {"lr": 0.1, "momentum": 0.9}
    kernels.momentum_step_([mine], [d], [buffer], 0.1, 0.9, 0.01, True, *keys("p"))
    common: dict[str, Any] = {"rounding": Rounding(3, 0), "names": ["p"], "weight_decay": 0.01}
    momentum_step_([p], [d], [b], **options, **common, decoupled=True)
    eps = torch.finfo(dtype).eps
    for found, expected in ((mine, p), (buffer, b)):
        torch.testing.assert_close(found, expected, rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize("programs", [1, 2, 5])
@pytest.mark.parametrize("n", [0, 1, 4095, 4096, 4097, 30_000])
@pytest.mark.parametrize("dtype", LOW)
def test_inner_products(dtype: torch.dtype, n: int, programs: int) -> None:
    torch.manual_seed(0)
    x, y = (torch.randn(n, device=DEVICE).to(dtype) for _ in range(2))
    found, expected = inner_product_kernel.launch(x, y, programs), (x.double() * y.double()).sum()
    assert (found.shape, found.dtype) == ((programs,), torch.float32)
    others = kernels.inner_product(x, y), inner_product(x.view(1, -1), y.view(1, -1))
    for sums in (found, *others):
        torch.testing.assert_close(sums.double().sum(), expected, rtol=1e-5, atol=1e-3)


def test_inner_products_in_as_many_parts_as_pay() -> None:
    sizes = {0: 1, 4096: 1, 4097: 2, 1 << 20: 256, 1 << 30: 512}
    assert {n: kernels._programs(n) for n in sizes} == sizes


def test_no_file_of_a_kernel_hides_an_operator() -> None:
    """Importing a module sets an attribute of its package."""
    for file in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"{kernels.__name__}.{file.name}")
    for name in ("stochastic_round", "momentum_step_", "inner_product"):
        assert isinstance(getattr(kernels, name), torch._library.custom_ops.CustomOpDef)


def test_the_operators() -> None:
    """Schemas, fakes and references of the operators."""
    x, (names, word) = torch.randn(4, 5, device=DEVICE), keys("p", "q", "r", "s")
    check = torch.library.opcheck
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    check(kernels.stochastic_round, (x, torch.bfloat16, names, word, 2), test_utils=tests)
    low = x.bfloat16().view(-1)
    check(kernels.inner_product, (low, low), test_utils=tests)
    for unless in ((), (torch.tensor(False, device=DEVICE),)):
        moved = [x], [x.clone()], [x.clone()]
        numbers = 0.1, 0.9, 0.0, False
        check(kernels.momentum_step_, (*moved, *numbers, names, word, *unless), test_utils=tests)
