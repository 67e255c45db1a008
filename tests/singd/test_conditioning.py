"""Badly conditioned curvature: rounding must not make the factors grow, whatever is summed."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from singd import SINGD, precision, update
from structured import parse
from tests.singd.runs import distance, mean_loss, snapshot
from tests.singd.test_few_rows import MODELS, inputs, make, train

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
    monkeypatch.setattr(precision, "_cpu_has_bfloat16", lambda: has_bfloat16)
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


@pytest.mark.parametrize("case", ["products", "plain", "bfloat16"])
@pytest.mark.parametrize("kfac_like", [True, False])
@pytest.mark.parametrize("structure", ["block_diagonal(8)", "hierarchical(4, 4)", "dense"])
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
    c = update.resolved_damping(1e-3, 1.0, norm)
    assert c.tolist() == pytest.approx([1e-3, 1e-3, 8 * 2**-23 * 1e9])
    c = update.resolved_damping(torch.full((3,), 1e-3), torch.tensor([1.0, 2e3, 0.0]), norm)
    assert c.tolist() == pytest.approx([1e-3, 8 * 2**-23 * 2e6, 1e-3])


@pytest.mark.parametrize("kfac_like", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("model_name", MODELS)
def test_a_factor_applied_to_the_rows_gives_the_same_factors(
    model_name: str, mixed: bool, kfac_like: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, where rounding does not show; also where units of one bucket differ."""

    def run(form: Any) -> Any:
        monkeypatch.setattr(SINGD, "_form", lambda _, unit, side: form(unit))
        monkeypatch.setattr(SINGD, "_pays", lambda *_: False)
        model, optimizer = make(model_name, T=2, kfac_like=kfac_like)
        train(model, optimizer, (9, 5))
        return snapshot(model, optimizer)

    def rooted(unit: Any) -> str:
        return "S" if mixed and unit.name.startswith(("0", "first")) else "H"

    assert distance(run(rooted), run(lambda _: "S")) < 1e-9


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
        forms = {form for unit in optimizer._units for form in unit.forms.values()}
        assert forms == ({"S"} if setting == "highest" else {"H"})
    finally:
        torch.set_float32_matmul_precision(before)
    assert not precision.rounds_products(torch.float64, torch.device("cuda"))
    assert precision.rounds_products(BF16, torch.device("cuda"))


def test_diagonals_need_no_factor_and_no_least_damping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their products are taken number by number."""
    monkeypatch.setattr("singd.rule.rounds_products", lambda *_: True)
    structures = ("diagonal", "diagonal")
    P = settled(rows(1e12), torch.float32, False, damping=1e-3, structures=structures)
    S = rows(1e12).double().square().mean(0)
    torch.testing.assert_close(P.diagonal() * (S + 1e-3), torch.ones(N).double(), rtol=1e-3, atol=0)
    layer = nn.Linear(N, 4, bias=False)
    optimizer = SINGD(layer, T=1, structures=("diagonal", "dense"))
    layer(rows(1.0)).square().mean().backward()
    (unit,) = optimizer._units
    assert [optimizer._form(unit, side) for side in "KC"] == ["S", "H"]
