"""The kernels of ``singd`` against their twins: interpreted on the CPU, or on a GPU."""

from __future__ import annotations

import pytest
import torch
from singd.rounding import Rounding, stochastic_round

from singd import descent, update

pytest.importorskip("triton")
from singd.kernels import descent as descent_kernel
from singd.kernels import inner_product
from singd.kernels.rounding import round_sum

from singd import kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LOW = (torch.bfloat16, torch.float16)


def seed(number: int = 1 << 50) -> torch.Tensor:
    return torch.tensor([number], device=DEVICE)


def rounded(x: torch.Tensor, dtype: torch.dtype, *, stream: int = 0) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=dtype, device=DEVICE)
    round_sum(out, x.to(DEVICE), None, seed(), stream)
    return out


@pytest.mark.parametrize("dtype", LOW)
def test_rounds_to_a_neighbour(dtype):
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
def test_rounding_has_no_bias(dtype, part):
    """The share that is rounded up is the distance to the lower neighbour, as for the twin."""
    eps, count = torch.finfo(dtype).eps, 40_000
    x = torch.full((count,), 1 + part * eps, device=DEVICE)
    deviation = (part * (1 - part) / count) ** 0.5
    for found in (rounded(x, dtype), stochastic_round(x, dtype)):
        share = float((found.float() > 1).float().mean())
        assert abs(share - part) < 5 * deviation


def test_streams_seeds_and_places_are_independent():
    x = torch.full((2, 5000), 1 + torch.finfo(torch.bfloat16).eps / 2, device=DEVICE)
    bits = [rounded(x, torch.bfloat16, stream=stream) > 1 for stream in (0, 1)]
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=DEVICE)
    round_sum(out, x, None, seed(7), 0)
    rows = torch.cat([*bits, out > 1]).double()
    assert (torch.corrcoef(rows) - torch.eye(6, device=DEVICE)).abs().max() < 0.08
    assert torch.equal(bits[0], rounded(x, torch.bfloat16) > 1)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # NumPy, in the interpreter
@pytest.mark.parametrize("dtype", LOW)
def test_what_is_not_finite_stays(dtype):
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([nan, inf, -inf, 0.0, -0.0, 1e38])
    payload = torch.tensor([-1], dtype=torch.int32).view(torch.float32)
    torch.testing.assert_close(rounded(x[:5], dtype).cpu(), x[:5].to(dtype), equal_nan=True)
    assert rounded(payload, dtype).isnan().all()
    assert rounded(x, dtype)[-1] > 0


@pytest.mark.parametrize("alpha", [-0.01, [0.0, 1e-4, -1.0]])
@pytest.mark.parametrize("dtype", LOW)
def test_a_rounded_sum_in_place(alpha, dtype):
    torch.manual_seed(0)
    alpha, x = torch.tensor(alpha, device=DEVICE), torch.randn(3, 50, 41, device=DEVICE)
    before = torch.ones(3, 50, 41, dtype=dtype, device=DEVICE)
    exact = before.float() + (alpha[:, None, None] if alpha.ndim else alpha) * x
    K = before.clone()
    round_sum(K, x.mT.contiguous().mT, alpha, seed(), 3)
    error = K.float() - exact
    assert error.abs().max() <= 4 * torch.finfo(dtype).eps
    assert (error.mean((1, 2)).abs() < 5 * torch.finfo(dtype).eps / 2050**0.5).all()
    assert error.any() or not alpha.any()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_descent_of_many_parameters(dtype, momentum):
    torch.manual_seed(0)
    M = torch.randn(5, 8, device=DEVICE)  # a weight with its bias, side by side
    directions = [M[:, :-1].unflatten(1, (7, 1)), M[:, -1], torch.randn(3, 2, 4, device=DEVICE).mT]
    directions += [torch.randn(0, device=DEVICE), torch.randn(9000, device=DEVICE)]
    directions[-1] = directions[-1].to(dtype)
    params = [torch.randn(d.shape, device=DEVICE).to(dtype) for d in directions]
    buffers = [torch.randn_like(p) for p in params] if momentum else []
    mine = [[t.clone() for t in group] for group in (params, buffers)]
    kept = [d.clone() for d in directions]
    descent_kernel.launch(mine[0], directions, mine[1], 0.1, momentum, 0.01, seed(), 0)
    descent.plain(params, directions, buffers, 0.1, momentum, 0.01, Rounding(0, 0))
    eps = torch.finfo(dtype).eps
    for found, expected in zip(mine[0] + mine[1], params + buffers, strict=True):
        torch.testing.assert_close(found, expected, rtol=2 * eps, atol=2 * eps)
    for found, expected in zip(directions, kept, strict=True):
        assert torch.equal(found, expected)
    if dtype in LOW:
        bias = (mine[0][-1].double() - params[-1].double()).mean()
        assert abs(bias) < 5 * eps / 9000**0.5


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_what_guards_a_descent_keeps_all_or_nothing(dtype, momentum):
    """As for the twin."""
    torch.manual_seed(0)
    params = [torch.randn(n, device=DEVICE).to(dtype) for n in (9000, 3)]
    buffers = [torch.randn_like(p) for p in params] if momentum else []
    directions = [torch.randn(p.shape, device=DEVICE) for p in params]
    bad = [torch.full_like(d, torch.nan) for d in directions]

    def step(along, *ok, of=descent_kernel.launch):
        moved = [p.clone() for p in params], along, [b.clone() for b in buffers]
        of(*moved, 0.1, momentum, 0.01, seed(), 0, *ok)
        return moved[0] + moved[2]

    yes, no = (torch.tensor(value, device=DEVICE) for value in (True, False))
    for of in (descent_kernel.launch, kernels.descend_):
        taken = step(directions, yes, of=of)
        torch.testing.assert_close(taken, step(directions, of=of), rtol=0, atol=0)
        torch.testing.assert_close(step(bad, no, of=of), params + buffers, rtol=0, atol=0)
        assert not torch.equal(taken[1], params[1])


def test_small_steps_add_up():
    """Steps far below a unit in the last place move a bfloat16 parameter as they should."""
    p, d = torch.ones(4000, device=DEVICE).bfloat16(), torch.ones(4000, device=DEVICE)
    for step in range(20):
        descent_kernel.launch([p], [d], [], 1e-4, 0.0, 0.0, seed(), 8 * step)
    assert abs(float(p.double().mean()) - 0.998) < 2e-4


def test_descent_of_no_parameters():
    descent.descend([], [], [], lr=1.0, momentum=0.0, weight_decay=0.0, rounding=Rounding(0, 0))


def test_descent_in_float32_is_that_of_sgd():
    torch.manual_seed(0)
    ours = [torch.randn(4, 3), torch.randn(5)]
    theirs = [p.clone().requires_grad_() for p in ours]
    sgd = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, weight_decay=0.01)
    buffers = [torch.zeros_like(p) for p in ours]
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    for _ in range(3):
        moves = [torch.randn_like(p) for p in ours]
        for p, d in zip(theirs, moves, strict=True):
            p.grad = d.clone()
        sgd.step()
        descent.descend(ours, moves, buffers, **options, rounding=Rounding(0, 0))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q.detach())


def test_a_rounded_sum_of_rounding_is_its_twin_on_the_cpu():
    stored, x = torch.ones(2, 4000, dtype=torch.bfloat16), torch.ones(2, 4000)
    Rounding(3, 0).add_(stored, x, torch.tensor([1e-4, -1e-3]))
    means = stored.double().mean(1) - 1
    torch.testing.assert_close(means, torch.tensor([1e-4, -1e-3]).double(), rtol=0, atol=3e-4)
    exact = torch.ones(2, 3, dtype=torch.float64)
    Rounding(3, 0).add_(exact, torch.ones(2, 3).double(), torch.tensor(0.1, dtype=torch.float64))
    torch.testing.assert_close(
        exact, torch.full((2, 3), 1.1, dtype=torch.float64), rtol=0, atol=1e-15
    )


@pytest.mark.parametrize("programs", [1, 2, 5])
@pytest.mark.parametrize("n", [0, 1, 4095, 4096, 4097, 30_000])
@pytest.mark.parametrize("dtype", LOW)
def test_inner_products(dtype, n, programs):
    torch.manual_seed(0)
    x, y = (torch.randn(n, device=DEVICE).to(dtype) for _ in range(2))
    found, expected = inner_product.launch(x, y, programs), (x.double() * y.double()).sum()
    assert (found.shape, found.dtype) == ((programs,), torch.float32)
    for sums in (found, kernels.inner(x, y), update.inner(x.view(1, -1), y.view(1, -1))):
        torch.testing.assert_close(sums.double().sum(), expected, rtol=1e-5, atol=1e-3)


def test_inner_products_in_as_many_parts_as_pay():
    sizes = {0: 1, 4096: 1, 4097: 2, 1 << 20: 256, 1 << 30: 512}
    assert {n: kernels._programs(n) for n in sizes} == sizes


def test_the_operators():
    """Schemas, fakes and the twins behind them."""
    x, s = torch.randn(4, 5, device=DEVICE), seed()
    check = torch.library.opcheck
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    check(kernels.stochastic_round, (x, torch.bfloat16, s, 0), test_utils=tests)
    alpha = torch.tensor(0.1, device=DEVICE)
    check(kernels.add_rounded_, (x.bfloat16(), x, alpha, s, 0), test_utils=tests)
    check(kernels.inner, (x.bfloat16().view(-1), x.bfloat16().view(-1)), test_utils=tests)
    for ok in ((), (torch.tensor(True, device=DEVICE),)):
        moved = [x], [x.clone()], [x.clone()]
        check(kernels.descend_, (*moved, 0.1, 0.9, 0.0, s, 0, *ok), test_utils=tests)
