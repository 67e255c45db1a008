"""The Gaussian of the example: density, samples, and two ways to the same maximum."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
import torch
from torch.distributions import MultivariateNormal

from structured import parse

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "plot_gaussian.py"
STRUCTURES = ["dense", "diagonal", "block_diagonal(2)", "hierarchical(1, 2)", "lower_toeplitz"]


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    """Names of the script, executed."""
    mpl.use("Agg")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plt, "show", lambda: None)
        names = runpy.run_path(str(SCRIPT), run_name="__main__")
    plt.close("all")
    return names


def gaussian(example: dict[str, Any], structure: str) -> Any:
    torch.manual_seed(0)
    K = parse(structure).identity(5, dtype=torch.float64)
    K = K + 0.3 * K.map(torch.randn_like)
    return example["Gaussian"](torch.randn(5, dtype=torch.float64), K)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_density_is_that_of_torch(example: dict[str, Any], structure: str) -> None:
    ours = gaussian(example, structure)
    K, x = ours.K.to_dense(), torch.randn(7, 5, dtype=torch.float64)
    theirs = MultivariateNormal(ours.mu, precision_matrix=K @ K.mT)
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_samples_whiten_exactly(example: dict[str, Any], structure: str) -> None:
    ours = gaussian(example, structure)
    x = ours.sample(6, torch.Generator().manual_seed(1))
    z = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close((x - ours.mu) @ ours.K, z.mT)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_fit_is_the_maximum_that_autograd_finds(example: dict[str, Any], structure: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64)
    fitted = example["fit"](x, structure)
    start = parse(structure).identity(5, dtype=torch.float64)
    tensors = [t.clone().requires_grad_() for t in start.tensors()]
    optimizer = torch.optim.LBFGS(
        tensors, max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        ours = example["Gaussian"](x.mean(0), start.with_tensors(tensors))
        value = -ours.log_prob(x).mean()
        value.backward()
        return value

    optimizer.step(loss)
    torch.testing.assert_close(fitted.log_prob(x).mean(), -loss().detach(), rtol=1e-7, atol=0)


def test_dense_fit_inverts_the_covariance(example: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 5, dtype=torch.float64)
    K = example["fit"](x, "dense").K.to_dense()
    torch.testing.assert_close(
        K @ K.mT, torch.linalg.inv(torch.cov(x.mT, correction=0)), rtol=1e-5, atol=1e-5
    )


def test_nested_families_capture_more_nats(example: dict[str, Any]) -> None:
    nats = example["nats"]
    for family in (
        ["diagonal", "block_diagonal(8)", "block_diagonal(16)", "block_diagonal(32)", "dense"],
        ["diagonal", "hierarchical(4, 4)", "hierarchical(8, 8)", "hierarchical(16, 16)", "dense"],
    ):
        values = [nats[structure] for structure in family]
        assert values == sorted(values)
    assert nats["lower_toeplitz"] > nats["block_diagonal(8)"]
