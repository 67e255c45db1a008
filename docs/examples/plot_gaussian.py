r"""
Gaussians with a structured precision
=====================================

Any structure is a family of Gaussians: those whose precision is :math:`K K^T` with :math:`K` in the
structure. The map :math:`x \mapsto K^T (x - \mu)` whitens, so one solve draws a sample and one
product evaluates a density. Here the families are fitted to images of digits, and we count how many
nats of the density each number of :math:`K` buys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from structured import StructuredMatrix, parse

# %%
# The Gaussian
# ------------
# :math:`x = \mu + K^{-T} z` with standard normal :math:`z` has the covariance
# :math:`K^{-T} K^{-1} = (K K^T)^{-1}`, and
#
# .. math:: \log p(x) = \log |\det K| - \tfrac12 \|K^T (x - \mu)\|^2 - \tfrac{n}{2} \log 2 \pi .


@dataclass(frozen=True)
class Gaussian:
    """``N(mu, (K K^T)^-1)`` for ``mu [n]`` and a structured ``K [n, n]``."""

    mu: Tensor
    K: StructuredMatrix

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``[count, n]``."""
        z = torch.randn(self.K.n, count, dtype=self.mu.dtype, generator=generator)
        return self.mu + self.K.mT.solve(z).mT

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of every row of ``x [..., n]``, in nats."""
        squares = ((x - self.mu) @ self.K).square().sum(-1)
        return self.K.logdet() - 0.5 * (squares + self.K.n * math.log(2 * math.pi))


# %%
# Maximum likelihood
# ------------------
# For centred data :math:`X` (columns) with covariance :math:`S = X X^T / N`, the mean
# log-likelihood is :math:`\log |\det K| - \frac12 \operatorname{tr} K^T S K` and a constant. Its
# natural gradient within the structure is the step of the inverse-free methods,
#
# .. math:: m = \tfrac12 \left( \Pi(K^T S K) - I \right), \qquad K \leftarrow K (I - \beta m) ,
#
# so the maximum is where :math:`\Pi(K^T S K) = I`. :math:`S` is never formed. (For a dense
# :math:`K` and :math:`\beta = 1` this is the Newton-Schulz iteration for :math:`S^{-1/2}`.)
# Dividing :math:`\beta` by the norm of a long :math:`m` keeps every iterate invertible.


def fit(x: Tensor, structure: str, *, beta: float = 0.2, tolerance: float = 1e-6) -> Gaussian:
    """The Gaussian of greatest likelihood for the rows of ``x [N, n]``."""
    mu = x.mean(0)
    X = (x - mu).mT / math.sqrt(len(x))
    K = parse(structure).identity(len(mu), dtype=x.dtype)
    for _ in range(1000):
        m = 0.5 * K.project_gram(K.apply_transpose(X)).add_scaled_identity(-1.0)
        K = K - (beta / m.frobenius_norm().clamp(min=1.0)) * (K @ m)
        if m.frobenius_norm() < tolerance:
            return Gaussian(mu, K)
    raise RuntimeError(f"{structure}: not stationary to {tolerance} after 1000 steps")


# %%
# Digits
# ------
# 1797 images of 8 x 8 pixels with 17 grey levels, row by row. Uniform noise makes the levels
# continuous (else a pixel that is always 0 would have an infinite density); every pixel is
# standardised.

torch.set_num_threads(1)  # the matrices are small
generator = torch.Generator().manual_seed(0)
x = torch.tensor(load_digits().data)
x = x + torch.rand(x.shape, dtype=x.dtype, generator=generator)
train, test = x[torch.randperm(len(x), generator=generator)].split([1297, 500])
center, scale = train.mean(0), train.std(0)
train, test = (train - center) / scale, (test - center) / scale

structures = [
    "diagonal",
    "lower_toeplitz",
    "block_diagonal(8)",
    "block_diagonal(16)",
    "block_diagonal(32)",
    "hierarchical(4, 4)",
    "hierarchical(8, 8)",
    "hierarchical(16, 16)",
    "dense",
]
fits = {structure: fit(train, structure) for structure in structures}
independent = fits["diagonal"].log_prob(test).mean()
numbers, nats = {}, {}
for structure, gaussian in fits.items():
    numbers[structure] = sum(t.numel() for t in gaussian.K.tensors())
    nats[structure] = float(gaussian.log_prob(test).mean() - independent)
    print(f"{structure:21} {numbers[structure]:5} numbers  {nats[structure]:6.2f} nats per image")

# %%
# What each structure captures
# ----------------------------
# Nats per held-out image above independent pixels. Each structure is a statement about the pixels.
# ``block_diagonal(8)`` lets the 8 pixels of a row depend on each other, and the rows not.
# ``hierarchical(k1, k2)`` lets the pixels in the middle be independent given the first ``k1`` and
# the last ``k2``; rows at the margin are mostly blank, so this suits digits less.
# ``lower_toeplitz`` says that a pixel depends on those after it in the same way everywhere, and is
# by far the best buy: 64 numbers capture four tenths of what 4096 do.

fig, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
for family, marker in {"block": "s", "hier": "^", "lower": "o", "diag": "o", "dense": "o"}.items():
    chosen = [structure for structure in structures if structure.startswith(family)]
    axis.plot([numbers[s] for s in chosen], [nats[s] for s in chosen], marker + "--")
for structure in structures:
    point = numbers[structure], nats[structure]
    axis.annotate(structure, point, (4, -10), textcoords="offset points", fontsize=7)
axis.set(xscale="log", xlabel="numbers stored", ylabel="nats per image above independence")
axis.margins(x=0.2, y=0.1)
plt.show()

# %%
# Samples
# -------
# Four draws from some of the fitted Gaussians.

shown = ["diagonal", "lower_toeplitz", "hierarchical(16, 16)", "dense"]
fig, axes = plt.subplots(4, len(shown), figsize=(6, 6), layout="constrained")
for structure, column in zip(shown, axes.T, strict=True):
    column[0].set_title(structure, fontsize=8)
    images = center + scale * fits[structure].sample(len(column), generator)
    for image, axis in zip(images, column, strict=True):
        axis.imshow(image.view(8, 8).numpy(), cmap="gray", vmin=0, vmax=17)
        axis.axis("off")
plt.show()
