"""The laws of inverse-free Shampoo: gradient, first order, fixed points, bounds, any order."""

from __future__ import annotations

import math
import string

import pytest
import torch
from torch import Tensor, nn

from docs.examples.shampoo import Shampoo, curvatures, factor_steps, unwhiten, whiten
from singd.testing import LAWS, check_method
from structured import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Kronecker,
    StructuredMatrix,
    StructureLike,
    parse,
)
from tests.singd.runs import running_mean

STRUCTURES = ["dense", "diagonal", "block_diagonal(2)", "hierarchical(1, 1)", "lower_toeplitz"]
SHAPES = [(4,), (4, 3), (3, 4, 2), (3, 2, 2, 3)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def member(structure: str, n: int, size: float = 0.3) -> StructuredMatrix:
    """Near the identity and not symmetric."""
    K = parse(structure).identity(n, dtype=torch.float64)
    return K + size * K.map(torch.randn_like)


def first_factors(G: Tensor, structure: StructureLike, damping: float) -> list[StructuredMatrix]:
    """Equal multiples of the identity for which ``||Y||^2 <= d``."""
    scale = (G.square().mean() + damping) ** (-0.5 / G.ndim)
    return [scale * parse(structure).identity(n, dtype=G.dtype) for n in G.shape]


def times(G: Tensor, matrices: list[Tensor]) -> Tensor:
    """``G x_1 M_1 ... x_k M_k`` by einsum."""
    rows, columns = string.ascii_lowercase[: G.ndim], string.ascii_uppercase[: G.ndim]
    pairs = ",".join(R + r for r, R in zip(rows, columns, strict=True))
    return torch.einsum(f"{rows},{pairs}->{columns}", G, *matrices)


def unfold(G: Tensor, i: int) -> Tensor:
    return G.movedim(i, 0).reshape(G.shape[i], -1)


def free_energy(factors: list[StructuredMatrix], gradients: list[Tensor], lam: float) -> Tensor:
    """The objective of the docstring, for the mean of the gradients' outer products."""
    K = [factor.to_dense() for factor in factors]
    d = gradients[0].numel()
    data = sum(times(G, [M.mT for M in K]).square().sum() for G in gradients) / len(gradients)
    damping = lam * math.prod(M.square().sum() for M in K)
    volume = sum(d / len(M) * torch.linalg.slogdet(M).logabsdet for M in K)
    return 0.5 * (data + damping) - volume


def mean_curvatures(
    factors: list[StructuredMatrix], gradients: list[Tensor], lam: float
) -> list[StructuredMatrix]:
    """The stream is one more mode, that keeps the identity."""
    stream = Diagonal.identity(len(gradients), dtype=torch.float64)
    Y = whiten([*factors, stream], torch.stack(gradients, -1))
    return curvatures([*factors, stream], Y, lam)[:-1]


def residual(H: list[StructuredMatrix]) -> float:
    return max(float(H_i.add_scaled_identity(-1.0).frobenius_norm()) for H_i in H)


def product(factors: list[StructuredMatrix]) -> Tensor:
    """``S^-1``, written out: free of the scale that factors may exchange."""
    S = torch.ones(1, 1, dtype=torch.float64)
    for K in factors:
        S = torch.kron(S, K.to_dense() @ K.to_dense().mT)
    return S


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("shape", SHAPES)
def test_whitening_is_a_product_along_every_mode(shape: tuple[int, ...], structure: str) -> None:
    factors, G = [member(structure, n) for n in shape], random(*shape)
    matrices = [K.to_dense() for K in factors]
    torch.testing.assert_close(whiten(factors, G), times(G, [M.mT for M in matrices]))
    torch.testing.assert_close(unwhiten(factors, G), times(G, matrices))


def test_whitening_a_matrix_is_the_kronecker_product() -> None:
    C, K, G = member("block_diagonal(2)", 3), member("hierarchical(1, 1)", 4), random(3, 4)
    torch.testing.assert_close(whiten([C, K], G), Kronecker(C, K).mT.apply_matrix(G))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_step_follows_the_gradient_of_the_free_energy(
    shape: tuple[int, ...], structure: str
) -> None:
    """``df = d/d_i <H_i - I, n> = d/(2 d_i) <r + r^T, n>`` with ``r = Pi(H_i) - I``."""
    factors, G, lam = [member(structure, n) for n in shape], random(*shape), 0.3
    H = curvatures(factors, whiten(factors, G), lam)
    for i, K in enumerate(factors):
        direction = K.map(torch.randn_like)

        def along(t: Tensor, i: int = i, n: StructuredMatrix = direction) -> Tensor:
            moved = [*factors[:i], factors[i] + t * (factors[i] @ n), *factors[i + 1 :]]
            return free_energy(moved, [G], lam)

        slope = torch.func.grad(along)(torch.zeros((), dtype=torch.float64))
        r = H[i].add_scaled_identity(-1.0).to_dense()
        expected = G.numel() / K.n / 2 * torch.sum((r + r.mT) * direction.to_dense())
        torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_step_is_root_free_shampoo_to_first_order(shape: tuple[int, ...]) -> None:
    """The error against ``S <- (1 - b) S + b (... G S_2^-1 G^T ...)`` falls as ``b^2``."""
    factors, G, lam = [member("dense", n) for n in shape], random(*shape), 0.2
    inverses = [K.to_dense() @ K.to_dense().mT for K in factors]
    H = curvatures(factors, whiten(factors, G), lam)
    errors = []
    steps = [1e-2, 1e-3]
    for b in steps:
        worst = 0.0
        longest = max(float((0.5 * H_i.add_scaled_identity(-1.0)).frobenius_norm()) for H_i in H)
        moved = factor_steps(factors, H, b * max(1.0, longest))
        for i, n in enumerate(shape):
            others = [M if j != i else torch.eye(n).to(M) for j, M in enumerate(inverses)]
            traces = [M.trace() for j, M in enumerate(inverses) if j != i]
            new = unfold(G, i) @ unfold(times(G, others), i).mT
            new = (new + lam * math.prod(traces) * torch.eye(n)) * (n / G.numel())
            S = torch.linalg.inv((1 - b) * torch.linalg.inv(inverses[i]) + b * new)
            M = moved[i].to_dense()
            worst = max(worst, float((M @ M.mT - S).norm()))
        errors.append(worst)
    assert math.log(errors[0] / errors[1]) / math.log(steps[0] / steps[1]) >= 1.9


@pytest.mark.parametrize("size", [0.1, 10.0])
def test_long_steps_are_shortened_alike(size: float) -> None:
    factors = [member("dense", n, 0.01) for n in (4, 3)]
    H = curvatures(factors, whiten(factors, size * random(4, 3)), 0.1)
    m = [0.5 * (H_i.to_dense() - torch.eye(H_i.n)) for H_i in H]
    beta_1 = 0.1 / max(1.0, *(float(m_i.norm()) for m_i in m))
    for K, m_i, moved in zip(factors, m, factor_steps(factors, H, 0.1), strict=True):
        torch.testing.assert_close(moved.to_dense(), K.to_dense() - beta_1 * K.to_dense() @ m_i)


def correlated(shape: tuple[int, ...], count: int) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients with a Kronecker covariance, and its factors."""
    roots = [torch.eye(n).double() + 0.4 * random(n, n) for n in shape]
    gradients = [times(random(*shape), roots) for _ in range(count)]
    return gradients, [R @ R.mT for R in roots]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("shape", [(4, 3), (3, 2, 2, 3)])
def test_stationary_on_a_fixed_stream(shape: tuple[int, ...], structure: str) -> None:
    """``Pi(H_i) = I`` in the limit, where autograd finds no slope either."""
    gradients, _ = correlated(shape, 25)
    lam = 0.05
    factors = first_factors(gradients[0], structure, lam)
    for _ in range(250):
        factors = factor_steps(factors, mean_curvatures(factors, gradients, lam), 0.3)
    assert residual(mean_curvatures(factors, gradients, lam)) < 1e-9
    tensors = [[t.requires_grad_() for t in K.clone().tensors()] for K in factors]
    moved = [K.with_tensors(ts) for K, ts in zip(factors, tensors, strict=True)]
    free_energy(moved, gradients, lam).backward()
    assert max(float(t.grad.abs().max()) for ts in tensors for t in ts if t.numel()) < 1e-8


def test_dense_factors_reach_the_fixed_point_of_root_free_shampoo() -> None:
    """That is the maximum-likelihood Kronecker covariance, found here by exact alternation."""
    gradients, _ = correlated((4, 3), 30)
    stack = torch.stack(gradients)
    S1, S2 = torch.eye(4).double(), torch.eye(3).double()
    for _ in range(200):
        S1 = torch.einsum("tij,jl,tkl->ik", stack, torch.linalg.inv(S2), stack) / (30 * 3)
        S2 = torch.einsum("tji,jl,tlk->ik", stack, torch.linalg.inv(S1), stack) / (30 * 4)
    factors = first_factors(gradients[0], "dense", 0.0)
    for _ in range(150):
        factors = factor_steps(factors, mean_curvatures(factors, gradients, 0.0), 0.3)
    torch.testing.assert_close(
        product(factors), torch.kron(torch.linalg.inv(S1), torch.linalg.inv(S2)), rtol=1e-8, atol=0
    )


def test_converges_on_a_random_stream() -> None:
    """One gradient a step and ``beta_1 ~ 1/t``: to the inverse of the true covariance."""
    shape = (4, 3)
    gradients, covariances = correlated(shape, 2000)
    factors = first_factors(gradients[0], "dense", 0.0)
    truth = torch.kron(*covariances)
    errors = []
    for t, G in enumerate(gradients):
        factors = factor_steps(factors, curvatures(factors, whiten(factors, G), 0.0), 2 / (t + 10))
        if t + 1 in (30, 2000):
            K = torch.kron(*(K.to_dense() for K in factors))
            errors.append(float((K.mT @ truth @ K - torch.eye(12)).norm()))
    assert errors[1] < 0.2 * errors[0]
    assert errors[1] < 0.5


def test_invariant_under_a_change_of_coordinates() -> None:
    """Dense factors: the step in new coordinates is the old step in new coordinates."""
    P, Q, G = (torch.eye(n).double() + 0.3 * random(n, n) for n in (4, 3, 4))
    G = G[:, :3]
    K = [member("dense", 4), member("dense", 3)]
    L = [Dense(torch.linalg.solve(P, K[0].M)), Dense(torch.linalg.solve(Q, K[1].M))]
    new = times(G, [P.mT, Q.mT])  # W = P V Q^T, so dV = P^T dW Q
    for _ in range(3):
        K = factor_steps(K, curvatures(K, whiten(K, G), 0.0), 0.1)
        L = factor_steps(L, curvatures(L, whiten(L, new), 0.0), 0.1)
    step, moved = unwhiten(K, whiten(K, G)), unwhiten(L, whiten(L, new))
    torch.testing.assert_close(times(moved, [P, Q]), step)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_factors_share_the_scale(structure: str) -> None:
    factors, G = [member(structure, n) for n in (3, 4, 2)], random(3, 4, 2)
    H = curvatures(factors, whiten(factors, G), 0.3)
    means = torch.stack([H_i.trace() / H_i.n for H_i in H])
    torch.testing.assert_close(means, means[:1].expand(3))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_factors_stay_invertible_whatever_the_gradient(structure: str) -> None:
    factors = first_factors(random(4, 3), structure, 1e-4)
    for t in range(40):
        G = 10.0 ** (t % 9 - 4) * random(4, 3)
        before = torch.stack([K.logdet() for K in factors])
        factors = factor_steps(factors, curvatures(factors, whiten(factors, G), 1e-4), 0.5)
        after = torch.stack([K.logdet() for K in factors])
        assert (after - before > 4 * math.log(0.5)).all()  # no singular value of I - b m below 1/2


@pytest.mark.parametrize("structure", STRUCTURES)
def test_equal_parameters_are_worked_on_side_by_side(structure: str) -> None:
    factors, G = [member(structure, n) for n in (3, 4, 2)], random(5, 3, 4, 2)
    stacked = [K.map(lambda t: torch.stack([t, 2 * t, t, t, t])) for K in factors]
    H = curvatures(stacked, whiten(stacked, G), 0.3)
    together = factor_steps(stacked, H, 0.2)
    for i, scale in enumerate((1, 2, 1, 1, 1)):
        one = [K.map(lambda t, scale=scale: scale * t) for K in factors]
        alone = factor_steps(one, curvatures(one, whiten(one, G[i]), 0.3), 0.2)
        for K, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(K.map(lambda t, i=i: t[i]).to_dense(), expected.to_dense())


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("structure", ["dense", "diagonal", "hierarchical(1, 1)"])
def test_it_is_a_method(structure: str, law: str) -> None:
    check_method(lambda model, params: Shampoo(model, params, structures=structure), laws=[law])


def test_the_optimizer_against_the_formulas_written_out() -> None:
    lam, b1, b2, momentum, decay, T = 0.1, 0.2, 0.05, 0.7, 0.03, 2
    layer = nn.Linear(4, 3, bias=False).double()
    p = layer.weight
    W, buffer = p.detach().clone(), torch.zeros(3, 4).double()
    squares: list[float] = []
    optimizer = Shampoo(
        layer, lr=b2, damping=lam, lr_cov=b1, momentum=momentum, weight_decay=decay, T=T
    )
    for t in range(6):
        G = random(3, 4) * (10.0 if t == 3 else 1.0)
        p.grad = G.clone()
        if t == 0:
            C, K = (G.square().mean() ** -0.25 * torch.eye(n).double() for n in (3, 4))
        if t % T == 0:
            Y, c = C.mT @ G @ K, lam * G.square().mean()
            m_C = 0.5 * (Y @ Y.mT / 4 + c * K.square().sum() / 4 * C.mT @ C - torch.eye(3))
            m_K = 0.5 * (Y.mT @ Y / 3 + c * C.square().sum() / 3 * K.mT @ K - torch.eye(4))
            b = b1 / max(1.0, m_C.norm().item(), m_K.norm().item())
            C, K = C - b * C @ m_C, K - b * K @ m_K
        D = C @ C.mT @ G @ K @ K.mT
        squares.append(float(D.square().mean()))
        buffer = momentum * buffer + 0.2 * D / running_mean(squares, momentum) ** 0.5
        W = (1 - b2 * decay) * W - b2 * buffer
        optimizer.step()
        torch.testing.assert_close(p.detach(), W)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2), Scale())


class Scale(nn.Module):
    """Parameters of no and of one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.ones(()))
        self.shift = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.scalar * x + self.shift


def train(net: nn.Module, optimizer: Shampoo, steps: int) -> list[float]:
    torch.manual_seed(2)
    x = torch.randn(16, 1, 4, 4)
    y = torch.stack([x[:, 0, 0, 0] * x[:, 0, 1, 1], x[:, 0].mean((1, 2))], -1)
    dtype = next(net.parameters()).dtype

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (net(x.to(dtype)) - y.to(dtype)).square().mean()
        loss.backward()
        return loss

    return [optimizer.step(closure).item() for _ in range(steps)]


@pytest.mark.parametrize("structure", ["dense", "diagonal", "hierarchical(1, 1)"])
@pytest.mark.parametrize("T", [1, 5])
def test_trains_tensors_of_every_order(structure: str, T: int) -> None:
    net = network()
    optimizer = Shampoo(net, structures=structure, T=T, lr=0.02)
    losses = train(net, optimizer, 60)
    assert losses[-1] < 0.1 * losses[0]
    factors = {name: optimizer.state[p].keys() for name, p in net.named_parameters()}
    assert {
        name: len([k for k in keys if k.startswith("K_")]) for name, keys in factors.items()
    } == {
        "0.weight": 4,
        "0.bias": 0,
        "3.weight": 2,
        "3.bias": 0,
        "4.scalar": 0,
        "4.shift": 0,
    }


def test_trains_bfloat16_parameters_with_float32_factors() -> None:
    net = network().bfloat16()
    optimizer = Shampoo(net, lr=0.02)
    losses = train(net, optimizer, 60)
    assert losses[-1] < 0.3 * losses[0]
    factors = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, list)]
    assert {t.dtype for tensors in factors for t in tensors} == {torch.float32}


def test_a_function_of_the_size_is_a_structure_and_modes_may_differ() -> None:
    def short_dense(n: int, **options: object) -> StructuredMatrix:
        return Dense.zeros(n, **options) if n <= 4 else BlockDiagonal.zeros(n, 4, **options)

    net = nn.Conv2d(9, 3, 2)
    plan = Shampoo(net, structures=("dense", short_dense, "diagonal")).plan()
    assert plan.rows[0].structures.startswith("dense, ")
    assert plan.rows[0].structures.endswith("diagonal, diagonal")


def test_zero_gradients_are_harmless() -> None:
    layer = nn.Linear(2, 3)
    before = layer.weight.detach().clone()
    optimizer = Shampoo(layer, lr=0.1)
    for _ in range(5):
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
    assert torch.equal(layer.weight, before)
    assert all(torch.equal(K, torch.eye(len(K))) for K in optimizer.state[layer.weight]["K_0"])
