"""The error of a direction by factors in fewer bits, at a condition number of 1000."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from singd import SINGD
from structured import inverse_root

N, M, DAMPING = 32, 8, 1e-5
STRUCTURES = ("dense", "lower_triangular", "hierarchical(4, 4)", "block_diagonal(8)", "diagonal")


def curvature(made: torch.Generator) -> tuple[Tensor, Tensor]:
    """``S`` with eigenvalues from 1 to 1/1000, and a root of it."""
    U = torch.linalg.qr(torch.randn(N, N, generator=made, dtype=torch.float64))[0]
    root = U * torch.logspace(0, -1.5, N, dtype=torch.float64)
    return root @ root.mT, root


def error(structure: str, dtype: torch.dtype | str, lr_cov: float = 0.02) -> float:
    """How far directions are from those of the best factor, after 400 updates, relative."""
    made = torch.Generator().manual_seed(0)
    S, root = curvature(made)
    layer = nn.Linear(N, M, bias=False)
    options = {"damping": DAMPING, "preconditioner_dtype": (dtype, dtype), "kfac_like": True}
    optimizer = SINGD(
        layer,
        structures=(structure, "diagonal"),
        T=1,
        lr=0.0,
        lr_cov=lr_cov,
        momentum=0.0,
        **options,
    )
    for _ in range(400):
        X = torch.randn(256, N, generator=made) @ root.mT.float()
        B = torch.randn(256, M, generator=made)
        optimizer.zero_grad()
        (layer(X) * B).sum().div(256).backward()
        optimizer.step()
    (stored,) = optimizer.stored_factors()
    K = stored.factors.K.to(torch.float64)
    best = inverse_root(structure, S, DAMPING * S.diagonal().mean())
    errors = []
    for _ in range(5):
        G = torch.randn(M, N, generator=made, dtype=torch.float64) @ root.mT
        found, expected = (F.apply(F.apply_transpose(G.mT)) for F in (K, best))
        errors.append(float((found / found.norm() - expected / expected.norm()).norm()))
    return sum(errors) / len(errors)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_errors_stay_below_what_the_docs_say(structure: str) -> None:
    """And 24 bits are as good as 32."""
    coupled = structure in ("dense", "lower_triangular")
    plain, split = error(structure, torch.float32), error(structure, "bfloat16+8")
    assert max(plain, split) < 0.045
    assert split == pytest.approx(plain, rel=0.01)
    assert error(structure, torch.bfloat16) < (0.1 if coupled else 0.06)
    assert error(structure, "int8") < (0.3 if coupled else 0.08)
