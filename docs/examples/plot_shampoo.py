r"""
A second method: inverse-free Shampoo
=====================================

A method of your own is a :class:`singd.Method`. This one is for parameters of any order and needs
no hooks: root-free, inverse-free Shampoo (Lin et al., ICML 2024, arXiv 2402.03496), derived and
written out in :ref:`sphx_glr_auto_examples_shampoo.py`. We train a small convolutional network on
digits, against AdamW and against Shampoo as it was, with roots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import matplotlib.pyplot as plt
import torch
from shampoo import Shampoo as InverseFreeShampoo
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LinearLR

from structured import BlockDiagonal, Dense, StructuredMatrix

# %%
# The rule in short
# -----------------
# A gradient :math:`G` has one factor :math:`K_i` for each of its modes. Whiten it, in every mode:
# :math:`Y = G \times_1 K_1^T \dots \times_k K_k^T`. Each factor then looks at its own mode of the
# whitened gradient, and moves until that is white on average:
#
# .. math:: m_i = \tfrac12 \left( \Pi \left( \tfrac{d_i}{d}\, Y_{(i)} Y_{(i)}^T + \dots \right)
#           - I \right), \qquad K_i \leftarrow K_i (I - \beta_1 m_i) .
#
# The descent direction is :math:`Y \times_1 K_1 \dots \times_k K_k`. All that it asks of a
# structure is ``apply``, ``apply_transpose``, ``project_gram``, ``gram``, and sums and products.
#
# The original
# ------------
# Shampoo keeps averages :math:`S_i` of :math:`G_{(i)} G_{(i)}^T`, takes
# :math:`G \times_1 S_1^{-1/2k} \dots \times_k S_k^{-1/2k}`, and borrows the length of Adam's step
# ("grafting"). The roots need an eigendecomposition of every factor.


class Shampoo(Optimizer):
    """Shampoo with roots and grafting (Gupta et al., 2018; Anil et al., 2020)."""

    def __init__(self, params: Iterable[Any], lr: float, *, beta: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "momentum": 0.9})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                G, state = torch.atleast_1d(p.grad.squeeze()), self.state[p]
                if not state:
                    state["S"] = [G.new_zeros(n, n, dtype=torch.float64) for n in G.shape]
                    state["v"], state["buffer"] = torch.zeros_like(G), torch.zeros_like(p)
                D = G.double()
                for i, S in enumerate(state["S"]):
                    U = G.double().movedim(i, 0).reshape(len(S), -1)
                    S.lerp_(U @ U.mT, 1 - group["beta"])
                    values, Q = torch.linalg.eigh(S)
                    floor = 1e-6 * values[-1] + 1e-20
                    root = Q * values.clamp(min=floor) ** (-0.5 / G.ndim) @ Q.mT
                    D = (root @ D.reshape(len(S), -1)).mT
                state["v"].lerp_(G.square(), 1 - group["beta"])
                adam = torch.linalg.norm(G / (state["v"].sqrt() + 1e-8))
                D = D.reshape(p.shape) * (adam / torch.linalg.norm(D).clamp(min=1e-20))
                state["buffer"].mul_(group["momentum"]).add_(D)
                p.sub_(group["lr"] * state["buffer"])


# %%
# Training
# --------
# Two convolutions, whose kernels are tensors of order 4, and a linear layer. All methods run 8
# epochs with a learning rate that falls linearly to zero from the value that gave the least
# training loss on a coarse grid; the inverse-free methods share one.

torch.set_num_threads(1)  # the network is small
images, labels = load_digits(return_X_y=True)
x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
x, y = x - x.mean(), torch.tensor(labels)
train, test = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).split([1297, 500])

EPOCHS, BATCH, SEEDS = 8, 64, 3


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def run(method: Callable[..., Optimizer], seed: int) -> tuple[list[float], float, Optimizer]:
    """Training loss after every epoch, and the final accuracy on the test set."""
    torch.manual_seed(seed)
    net = network()
    optimizer = method(net)
    steps = EPOCHS * len(train.split(BATCH))
    schedule = LinearLR(optimizer, start_factor=1.0, end_factor=1 / steps, total_iters=steps)
    losses = []
    for _ in range(EPOCHS):
        for batch in train[torch.randperm(len(train))].split(BATCH):
            optimizer.zero_grad()
            cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            losses.append(cross_entropy(net(x[train]), y[train]).item())
    with torch.no_grad():
        accuracy = float((net(x[test]).argmax(1) == y[test]).double().mean())
    return losses, accuracy, optimizer


# %%
# A structure is whatever can be called with a size, so a rule by size is a function. This one keeps
# small modes dense and cuts long ones into blocks.


def blocks_beyond_32(n: int, **options: Any) -> StructuredMatrix:
    return Dense.zeros(n, **options) if n <= 32 else BlockDiagonal.zeros(n, 16, **options)


def inverse_free(structures: Any) -> Callable[..., Optimizer]:
    return lambda net: InverseFreeShampoo(net, lr=2e-2, structures=structures)


methods: dict[str, Callable[..., Optimizer]] = {
    "AdamW": lambda net: AdamW(net.parameters(), 4e-2),
    "Shampoo, with roots": lambda net: Shampoo(net.parameters(), 4e-3),
    "inverse-free, dense": inverse_free("dense"),
    "inverse-free, blocks beyond 32": inverse_free(blocks_beyond_32),
    "inverse-free, hierarchical(4, 4)": inverse_free("hierarchical(4, 4)"),
    "inverse-free, diagonal": inverse_free("diagonal"),
}


def numbers(optimizer: Optimizer) -> int:
    """How many numbers the preconditioner stores."""
    stored: list[Tensor] = []
    for state in optimizer.state.values():
        stored += [state[key] for key in ("exp_avg_sq", "v") if key in state]
        stored += [t for value in state.values() if isinstance(value, list) for t in value]
    return sum(t.numel() for t in stored)


curves: dict[str, Tensor] = {}
for name, method in methods.items():
    results = [run(method, seed) for seed in range(SEEDS)]
    curves[name] = torch.tensor([losses for losses, _, _ in results])
    accuracy = torch.tensor([accuracy for _, accuracy, _ in results])
    print(
        f"{name:33} loss {curves[name][:, -1].mean():.4f}  accuracy {accuracy.mean():.3f}"
        f" +- {accuracy.std():.3f}  {numbers(results[0][2]):6} numbers"
    )

# %%
# What it costs and what it gives
# -------------------------------
# Without an eigendecomposition, the inverse-free method ends where the one with roots does, or
# lower, and structured factors keep that at about the memory of AdamW or less. Curves are means of
# three seeds.

fig, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
for name, losses in curves.items():
    style = "-" if name.startswith("inverse-free") else ":"
    axis.plot(range(1, EPOCHS + 1), losses.mean(0).numpy(), style, label=name)
axis.set(yscale="log", xlabel="epoch", ylabel="training loss")
axis.legend(fontsize=8)
plt.show()
