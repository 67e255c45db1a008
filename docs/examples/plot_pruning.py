r"""
Pruning by trained factors
==========================

With the inverse curvature :math:`S = C C^T \otimes K K^T`, the loss rises by :math:`w_i^2 / (2
S_{ii})` if a weight is removed and all others make up for it: the optimal brain surgeon (Hassibi &
Stork, NeurIPS 1992). The factors that SINGD leaves are what it needs. Here a network is pruned
without training it again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from digits import fit, images, network
from torch import Tensor, nn

from singd import export
from singd.factors import calibrate, keep, prune, row_scores, weight_scores

torch.set_num_threads(1)  # the network is small
torch.manual_seed(0)

EPOCHS = 30
x, y, test_x, test_y = images()
net = network()
optimizer = fit(net, x, y, epochs=EPOCHS)
loader = [(x[i], y[i]) for i in torch.arange(len(x)).split(100)]
factors = calibrate(export(optimizer), net, loader)
optimizer.close()
print(factors)

# %%
# The residual of C is above 0.3: its curvature is of gradients, which have almost vanished when
# training ends. So ``calibrate(..., refit=1e-2)``, which makes factors anew from the same pass, is
# shown beside it; for pruning it makes little difference.

refitted = calibrate(factors, net, loader, refit=1e-2)


def accuracy(model: nn.Module) -> float:
    with torch.no_grad():
        return float((model(test_x).argmax(1) == test_y).float().mean())


# %%
# The diagonal of the Fisher information
# --------------------------------------
# is what is used most: a weight counts :math:`w_i^2 F_{ii} / 2`, and the others stay.


def diagonal_fisher(model: nn.Sequential) -> dict[str, Tensor]:
    """``F_ii`` of both weights, over the labels that the model gives."""
    last = model[2]
    with torch.no_grad():
        hidden = model[:2](x)
        p = last(hidden).softmax(-1)
        found = {name: torch.zeros_like(model.get_parameter(name)) for name in factors}
        for c, one in enumerate(torch.eye(10)):
            g = p[:, c, None].sqrt() * (one - p)
            back = (g @ last.weight) * (1 - hidden.square())
            found["2.weight"] += g.square().T @ hidden.square() / len(x)
            found["0.weight"] += back.square().T @ x.square() / len(x)
    return found


fisher = diagonal_fisher(net)
weights = {name: net.get_parameter(name).detach() for name in factors}

# %%
# Accuracy over sparsity
# ----------------------

SPARSITY = [0.0, 0.5, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97]


def at_once(scores: dict[str, Tensor], *, update: bool) -> Callable[[nn.Module, float], None]:
    """All weights at once, of scores that are known before."""

    def remove(model: nn.Module, sparsity: float) -> None:
        prune(refitted, model, keep(scores, sparsity), update=update)

    return remove


def gradually(model: nn.Module, sparsity: float) -> None:
    """In four steps, each with the curvature at the weights that are left."""
    zeros = sum(int((model.get_parameter(name) == 0).sum()) for name in factors)
    done = zeros / sum(w.numel() for w in weights.values())
    for i in range(1, 5):
        fresh = calibrate(factors, model, loader, refit=1e-2)
        prune(fresh, model, keep(weight_scores(fresh, model), done + (sparsity - done) * i / 4))


def by_trained_factors(model: nn.Module, sparsity: float) -> None:
    prune(factors, model, keep(weight_scores(factors, model), sparsity))


methods: dict[str, Callable[[nn.Module, float], None]] = {
    "magnitude": at_once({k: w.abs() for k, w in weights.items()}, update=False),
    "diagonal Fisher": at_once({k: w**2 * fisher[k] for k, w in weights.items()}, update=False),
    "surgeon, trained factors": by_trained_factors,
    "surgeon, refitted": at_once(weight_scores(refitted, net), update=True),
    "surgeon, gradually": gradually,
}
curves: dict[str, list[float]] = {}
for name, method in methods.items():
    model, curves[name] = copy.deepcopy(net), []
    for sparsity in SPARSITY:
        model = model if name == "surgeon, gradually" else copy.deepcopy(net)
        method(model, sparsity)
        curves[name].append(accuracy(model))
    print(f"{name:25}", " ".join(f"{value:.3f}" for value in curves[name]))

# %%
# Rows
# ----
# A hidden unit is a row of the first weight, and its bias. Heads of an attention layer are groups
# of rows: ``row_scores(..., size)``.

UNITS = [0, 4, 8, 12, 16, 20, 24]
scores = row_scores(refitted, net)["0.weight"]
norms = weights["0.weight"].norm(dim=1)
rows: dict[str, list[float]] = {"norm of the row": [], "surgeon": []}
for count in UNITS:
    for name, values in (("norm of the row", norms), ("surgeon", scores)):
        model = copy.deepcopy(net)
        mask = keep({"0.weight": values}, count / len(values))
        prune(refitted, model, mask, update=name == "surgeon")
        rows[name].append(accuracy(model))
for name, found in rows.items():
    print(f"{name:25}", " ".join(f"{value:.3f}" for value in found))

# %%
# Without any training afterwards, the surgeon keeps most of the accuracy where the others have lost
# theirs. What matters is the move of the other weights: it needs the curvature between weights,
# which a diagonal does not have.

fig, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained", sharey=True)
for name, values in curves.items():
    axes[0].plot(SPARSITY, values, "-" if name.startswith("surgeon") else ":", label=name)
for name, values in rows.items():
    axes[1].plot(UNITS, values, "-" if name == "surgeon" else ":", label=name)
axes[0].set(xlabel="sparsity of all weights", ylabel="accuracy on the test set")
axes[1].set(xlabel="hidden units removed, of 32")
for axis in axes:
    axis.legend(fontsize=8)
plt.show()
