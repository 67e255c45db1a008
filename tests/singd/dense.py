"""The paper with dense matrices only, in the order of its text: what everything is held against.

Nothing here uses ``singd``. ``Pi`` is computed from its definition by least squares over a basis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from structured import parse

STRUCTURES = (
    "dense",
    "diagonal",
    "block_diagonal(2)",
    "lower_toeplitz",
    "upper_toeplitz",
    "hierarchical(1, 2)",
    "low_rank_upper(2)",
    "low_rank_lower(-1)",
)

Pi = Callable[[Tensor], Tensor]


def basis(structure: Any, n: int) -> Tensor:
    """An orthonormal basis of the space, ``[dim, n, n]``."""
    zero = parse(structure)(n, dtype=torch.float64)
    stored = zero.tensors()
    rows = []
    for i, t in enumerate(stored):
        for j in range(t.numel()):
            unit = [torch.zeros_like(s) for s in stored]
            unit[i].view(-1)[j] = 1.0
            rows.append(zero.with_tensors(unit).to_dense().flatten())
    Q, _ = torch.linalg.qr(torch.stack(rows, 1))
    return Q.T.reshape(-1, n, n)


def projection(structure: Any, n: int) -> Pi:
    """``Pi``: of all members whose symmetric part is nearest to ``S``, the smallest."""
    E = basis(structure, n)
    symmetric = ((E + E.mT) / 2).flatten(1).T
    solve = torch.linalg.pinv(symmetric, rtol=1e-10)
    return lambda S: torch.einsum("k,kij->ij", solve @ S.flatten(), E)


def ikfac(K: Tensor, S: Tensor, damping: float, pi: Pi) -> Tensor:
    """``m_K`` of IKFAC."""
    I = torch.eye(len(K), dtype=K.dtype)
    return 0.5 * (pi(K.T @ S @ K) + damping * pi(K.T @ K) - I)


def singd(
    K: Tensor, C: Tensor, S_K: Tensor, S_C: Tensor, damping: float, pi_K: Pi, pi_C: Pi
) -> tuple[Tensor, Tensor]:
    """New terms of ``m_K`` and ``m_C`` of SINGD (of INGD, for dense factors)."""
    d_in, d_out = len(K), len(C)
    I_K, I_C = torch.eye(d_in, dtype=K.dtype), torch.eye(d_out, dtype=C.dtype)
    H_K, H_C = pi_K(K.T @ S_K @ K), pi_C(C.T @ S_C @ C)
    c2, k2 = damping * pi_C(C.T @ C).trace(), damping * pi_K(K.T @ K).trace()
    m_K = (H_C.trace() * H_K + c2 * pi_K(K.T @ K)) / (2 * d_out) - I_K / 2
    m_C = (H_K.trace() * H_C + k2 * pi_C(C.T @ C)) / (2 * d_in) - I_C / 2
    return m_K, m_C


def kfac(S: Tensor, damping: float) -> Tensor:
    """``(S + lambda I)^-1``."""
    return torch.linalg.inv(S + damping * torch.eye(len(S), dtype=S.dtype))


def relative(got: Tensor, expected: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float(((got - expected).norm() / expected.norm()).detach())
