"""KL-Shampoo against its formulas with inverses and roots, which it does without."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from singd import KLShampoo
from singd.methods.shampoo import curvatures, factor_steps, symmetric_root, whiten
from structured import Dense, StructuredMatrix, parse
from tests.singd.runs import running_mean

CLOSED = ["dense", "block_diagonal(3)", "diagonal", "circulant", "scaled_identity"]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def power_of(S: Tensor, p: float) -> Tensor:
    values, U = torch.linalg.eigh(S)
    return (U * values**p) @ U.mT


def member(structure: str, n: int, size: float = 0.3) -> StructuredMatrix:
    K = parse(structure).identity(n, dtype=torch.float64)
    return K + size * K.map(torch.randn_like)


@pytest.mark.parametrize("structure", CLOSED)
@given(n=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_the_root_is_symmetric_positive_and_squares_to_the_product(
    structure: str, n: int, seed: int
) -> None:
    torch.manual_seed(seed)
    K = member(structure, n)
    P = symmetric_root(K).to_dense()
    expected = power_of(K.to_dense() @ K.to_dense().mT, 0.5)
    condition = float(torch.linalg.cond(K.to_dense()))
    if condition < 1e4:
        torch.testing.assert_close(P, expected, rtol=1e-8, atol=1e-8 * float(expected.norm()))


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
def test_the_root_keeps_digits_where_a_root_of_the_product_would_not(condition: float) -> None:
    """In float32 ``K K^T`` has no digits left of eigenvalues below 1e-7 of the largest."""
    torch.manual_seed(0)
    (U, _), (V, _) = (torch.linalg.qr(random(50, 50)) for _ in range(2))
    values = torch.logspace(-math.log10(condition), 0, 50, dtype=torch.float64)
    K = Dense(((U * values) @ V.mT).float())
    root = torch.linalg.eigvalsh(symmetric_root(K).to_dense().double())
    assert float(((root - values) / values).abs().max()) < 1e-6 * condition


@pytest.mark.parametrize("shape", [(4, 3), (3, 4, 2)])
def test_a_step_is_that_of_kl_shampoo_to_first_order(shape: tuple[int, ...]) -> None:
    """``S_1 <- (1 - b) S_1 + b / d_2 (G S_2^-1 G^T + c tr(S_2^-1) I)``: errors fall as ``b^2``."""
    torch.manual_seed(1)
    K, G, c = [member("dense", n) for n in shape], random(*shape), 0.2
    inverses = [(K_i.to_dense() @ K_i.to_dense().mT) for K_i in K]
    H = curvatures(K, whiten(K, G), c)
    longest = max(float((0.5 * H_i.add_scaled_identity(-1.0)).frobenius_norm()) for H_i in H)
    errors = []
    for b in (1e-2, 1e-3):
        moved, worst = factor_steps(K, H, b * max(1.0, longest)), 0.0
        for i, n in enumerate(shape):
            others = [torch.eye(m).double() if j == i else inverses[j] for j, m in enumerate(shape)]
            whole = others[0]
            for other in others[1:]:
                whole = torch.kron(whole, other)
            g = G.flatten()
            outer = (whole @ g).view(shape).movedim(i, 0).reshape(n, -1)
            new = outer @ G.movedim(i, 0).reshape(n, -1).mT
            trace = math.prod(float(M.trace()) for j, M in enumerate(inverses) if j != i)
            new = (new + c * trace * torch.eye(n)) * (n / G.numel())
            S = (1 - b) * torch.linalg.inv(inverses[i]) + b * new
            found = torch.linalg.inv(moved[i].to_dense() @ moved[i].to_dense().mT)
            worst = max(worst, float((found - S).norm()))
        errors.append(worst)
    assert math.log10(errors[0] / errors[1]) > 1.9


@pytest.mark.parametrize("power", [0.5, 1])
def test_the_optimizer_against_the_formulas_written_out(power: float) -> None:
    torch.manual_seed(0)
    c, b1, b2, momentum, T = 0.1, 0.2, 0.05, 0.7, 2
    layer = nn.Linear(4, 3, bias=False).double()
    p = layer.weight
    W, buffer = p.detach().clone(), torch.zeros(3, 4).double()
    squares: list[float] = []
    optimizer = KLShampoo(layer, lr=b2, damping=c, lr_cov=b1, momentum=momentum, T=T, power=power)
    for t in range(6):
        G = random(3, 4) * (10.0 if t == 3 else 1.0)
        p.grad = G.clone()
        if t == 0:
            C, K = (G.square().mean() ** -0.25 * torch.eye(n).double() for n in (3, 4))
        if t % T == 0:
            Y, d = C.mT @ G @ K, c * G.square().mean()
            m_C = 0.5 * (Y @ Y.mT / 4 + d * K.square().sum() / 4 * C.mT @ C - torch.eye(3))
            m_K = 0.5 * (Y.mT @ Y / 3 + d * C.square().sum() / 3 * K.mT @ K - torch.eye(4))
            b = b1 / max(1.0, m_C.norm().item(), m_K.norm().item())
            C, K = C - b * C @ m_C, K - b * K @ m_K
        D = power_of(C @ C.mT, power) @ G @ power_of(K @ K.mT, power)
        squares.append(float(D.square().mean()))
        buffer = momentum * buffer + 0.2 * D / running_mean(squares, momentum) ** 0.5
        W = W - b2 * buffer
        optimizer.step()
        torch.testing.assert_close(p.detach(), W)


def test_a_root_needs_a_structure_that_is_closed_under_transposition() -> None:
    with pytest.raises(ValueError, match=r"closed under transposition where power is 0\.5"):
        KLShampoo(nn.Linear(4, 3), structures="lower_triangular")
    KLShampoo(nn.Linear(4, 3), structures="lower_triangular", power=1)


def test_wide_dimensions_take_another_structure() -> None:
    optimizer = KLShampoo(nn.Embedding(40, 6), structures="up_to(30, dense, diagonal)")
    assert optimizer.plan().rows[0].structures == "diagonal, dense"
    with torch.device("meta"):
        assert KLShampoo(nn.Embedding(9000, 6)).plan().rows[0].structures == "diagonal, dense"
    with pytest.raises(ValueError, match=r"closed under transposition where power is 0\.5"):
        KLShampoo(nn.Linear(4, 3), structures="up_to(30, dense, lower_triangular)")
