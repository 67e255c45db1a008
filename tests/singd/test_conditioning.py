"""Badly conditioned curvature: rounding must not make the factors grow, whatever is summed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from singd import update
from singd.methods import inverse_free
from singd.ops import precision
from structured import parse
from tests.singd.paper import SINGD
from tests.singd.runs import F64, distance, mean_loss, snapshot

N = 32
BF16 = torch.bfloat16


def rows(largest: float, count: int = 4 * N) -> Tensor:
    """``X [count, n]`` whose second moments have eigenvalues from 1e-3 to about ``largest``."""
    generator = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(N, N, generator=generator))
    scales = torch.logspace(torch.tensor(largest).log10().item(), -3, N).sqrt()
    return torch.randn(count, N, generator=generator) @ (Q * scales).T


def settled(X: Tensor, dtype: torch.dtype, autocast: bool, **options: Any) -> Tensor:
    """``K K^T`` after 200 steps of IKFAC on the same rows, weights held still."""
    torch.manual_seed(0)
    layer = nn.Linear(N, 4, bias=False).to(dtype)
    optimizer = SINGD(layer, T=1, lr=0.0, kfac_like=True, kl_clip=None, **options)
    for _ in range(200):
        optimizer.zero_grad()
        with torch.autocast("cpu", BF16) if autocast else nullcontext():
            output = layer(X.to(dtype))
        mean_loss(output.float(), torch.zeros(len(X), 4)).backward()
        optimizer.step()
    assert optimizer.skipped == 0
    structure = options.get("structures", ("dense", "dense"))[0]
    zero = parse(structure)(N, dtype=optimizer.state[layer.weight]["K"][0].dtype)
    k = zero.with_tensors(optimizer.state[layer.weight]["K"]).to_dense().double()
    return k @ k.T


CASES: dict[str, tuple[float, torch.dtype, dict[str, Any]]] = {
    "products": (1e6, torch.float32, {}),
    "plain": (1e6, torch.float32, {"keep_products": False}),
    "normalized": (1e6, torch.float32, {"normalize_lr_cov": True}),
    "bfloat16": (1e2, BF16, {}),
    "bfloat16, plain": (1e2, BF16, {"keep_products": False}),
    "autocast": (1e4, torch.float32, {}),
    "factors in bfloat16": (1e2, torch.float32, {"preconditioner_dtype": (BF16, BF16)}),
}


@pytest.mark.parametrize("has_bfloat16", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_dense_factors_find_the_inverse(
    case: str, has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All eigenvalues of the preconditioned curvature within a factor of three of 1.

    With 4096 times the rounding of float32 as the least damping there is.
    """
    monkeypatch.setattr(precision, "has_bfloat16_products", lambda: has_bfloat16)
    largest, dtype, options = CASES[case]
    X, damping = rows(largest), 1e-3
    P = settled(X, dtype, case == "autocast", damping=damping, **options)
    seen = X.to(dtype).to(BF16) if case == "autocast" else X.to(dtype)
    S = seen.double().T @ seen.double() / len(X)
    low = BF16 in (dtype, *options.get("preconditioner_dtype", ()))
    rooted = low and has_bfloat16
    least = 0.0 if rooted else 2.0**-20 * float(S.norm())
    L = torch.linalg.cholesky(S + max(damping, least) * torch.eye(N).double())
    eigenvalues = torch.linalg.eigvalsh(L.T @ P @ L)
    assert 1 / 3 < float(eigenvalues.min()) <= float(eigenvalues.max()) < 3


@pytest.mark.parametrize(
    ("structure", "kfac_like", "case"),
    [
        *itertools.product(["dense", "hierarchical(4, 4)"], [True, False], ["products"]),
        *itertools.product(["dense", "block_diagonal(8)"], [True, False], ["bfloat16"]),
        *itertools.product(["block_diagonal(8)"], [True, False], ["plain"]),
        ("dense", True, "plain"),
        ("hierarchical(4, 4)", False, "plain"),
    ],
)
def test_no_factor_grows_without_end(structure: str, kfac_like: bool, case: str) -> None:
    largest, dtype, options = CASES[case]
    torch.manual_seed(0)
    layer = nn.Linear(N, 4, bias=False).to(dtype)
    pair = (structure, structure)
    optimizer = SINGD(layer, T=1, lr=0.0, structures=pair, kfac_like=kfac_like, **options)
    X, y = rows(largest).to(dtype), torch.randn(4 * N, 4)
    for _ in range(300):
        optimizer.zero_grad()
        mean_loss(layer(X).float(), y).backward()
        optimizer.step()
    assert optimizer.skipped == 0
    zero, state = parse(structure)(1, dtype=dtype), optimizer.state[layer.weight]
    K, C = (float(zero.with_tensors(state[side]).frobenius_norm()) for side in "KC")
    # Squared norms, if damping were all there is; in INGD the scale of each is left to the other.
    found = [K**2 * 1e-3 / N, C**2 * 1e-3 / 4] if kfac_like else [(K * C) ** 2 * 1e-3 / (4 * N)]
    assert max(found) < 2


def test_least_damping_is_what_sums_resolve() -> None:
    norm = torch.tensor([1.0, 1e3, 1e9])
    c = update.resolve_damping(1e-3, 1.0, norm)
    assert c.tolist() == pytest.approx([1e-3, 1e-3, 8 * 2**-23 * 1e9])
    c = update.resolve_damping(torch.full((3,), 1e-3), torch.tensor([1.0, 2e3, 0.0]), norm)
    assert c.tolist() == pytest.approx([1e-3, 8 * 2**-23 * 2e6, 1e-3])


class Repeated(nn.Module):
    """Two equal layers, of which the second sees more rows than it has inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        many = torch.stack([torch.sin(k * x) for k in range(1, 6)], 1)
        return self.first(x) + self.second(many).sum(1)


class Attending(nn.Module):
    """One sequence of three tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:3][None]
        return self.attention(x, x, x, need_weights=False)[0]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "layers": lambda: nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)),
    "repeated": Repeated,
    "attention": Attending,
}


def make(model_name: str, **options: Any) -> tuple[nn.Module, SINGD]:
    torch.manual_seed(0)
    model = MODELS[model_name]().to(F64)
    return model, SINGD(model, lr=0.1, kl_clip=1e-2, damping=0.01, **options)


def inputs(sizes: tuple[int, ...], seed: int = 1) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for size in sizes:
        yield torch.randn(size, 12, dtype=F64, generator=generator)


def train(model: nn.Module, optimizer: SINGD, sizes: tuple[int, ...], steps: int = 6) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        for x in inputs(sizes, seed=step):
            (model(x) - x.sum()).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kfac_like", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("model_name", MODELS)
def test_a_factor_applied_to_the_rows_gives_the_same_factors(
    model_name: str, mixed: bool, kfac_like: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, where rounding does not show; also where equal matrices differ in it."""

    def run(is_whitened: Callable[[], bool]) -> Any:
        monkeypatch.setattr(inverse_free, "is_whitened", lambda K: is_whitened())
        model, optimizer = make(model_name, T=2, kfac_like=kfac_like)
        train(model, optimizer, (9,) if mixed else (9, 5))
        return snapshot(model, optimizer)

    uses = itertools.count()  # both sides of one layer, then of the next
    some = (lambda: next(uses) // 2 % 2 == 0) if mixed else (lambda: True)
    assert distance(run(some), run(lambda: False)) < 1e-9


def kinds(optimizer: SINGD) -> list[list[str]]:
    """What was summed of every layer, for inputs and for output gradients."""
    statistics = optimizer._parts.capture.collect().values()
    return [[one.input.kind, one.grad.kind] for one in statistics]


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_products_that_may_be_rounded_take_the_factor_first(setting: str) -> None:
    """What is summed follows :func:`torch.set_float32_matmul_precision`."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        rounds = [
            precision.rounds_products(torch.float32, torch.device(d)) for d in ("cpu", "cuda")
        ]
        assert rounds == [setting != "highest"] * 2
        model, optimizer = make("layers", T=1)
        model.float()
        (x,) = inputs((30,))
        model(x.float()).square().mean().backward()
        assert kinds(optimizer) == [["covariance" if setting == "highest" else "whitened"] * 2] * 2
    finally:
        torch.set_float32_matmul_precision(before)
    assert not precision.rounds_products(torch.float64, torch.device("cuda"))
    assert precision.rounds_products(BF16, torch.device("cuda"))


def test_diagonals_need_no_factor_and_no_least_damping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their products are taken number by number."""
    monkeypatch.setattr(precision, "rounds_products", lambda *_: True)
    structures = ("diagonal", "diagonal")
    P = settled(rows(1e12), torch.float32, False, damping=1e-3, structures=structures)
    S = rows(1e12).double().square().mean(0)
    torch.testing.assert_close(P.diagonal() * (S + 1e-3), torch.ones(N).double(), rtol=1e-3, atol=0)
    layer = nn.Linear(N, 4, bias=False)
    optimizer = SINGD(layer, T=1, structures=("diagonal", "dense"))
    layer(rows(1.0)).square().mean().backward()
    assert kinds(optimizer) == [["covariance", "whitened"]]
