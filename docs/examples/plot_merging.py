r"""
Two tasks: a penalty that remembers, and merged models
======================================================

The loss of a task rises by :math:`\tfrac12 \|C^{-1} (W - W^*) K^{-T}\|^2` as weights leave its
minimum :math:`W^*`. As a penalty that keeps a task while another is learned (elastic weight
consolidation, Kirkpatrick et al., PNAS 2017), and as a weight for each model in an average (Matena
& Raffel, NeurIPS 2022).
"""

from __future__ import annotations

import copy

import matplotlib.pyplot as plt
import torch
from digits import fit, images, network
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from singd import SINGD, export
from singd.factors import KroneckerFactors, calibrate, ewc, merge

torch.set_num_threads(1)  # the network is small
torch.manual_seed(0)

EPOCHS = 20
x, y, test_x, test_y = images()
TASKS = {"digits 0 to 4": y < 5, "digits 5 to 9": y >= 5}
TESTS = {"digits 0 to 4": test_y < 5, "digits 5 to 9": test_y >= 5}


def accuracy(model: nn.Module, mask: Tensor) -> float:
    with torch.no_grad():
        return float((model(test_x[mask]).argmax(1) == test_y[mask]).float().mean())


def learn(net: nn.Module, mask: Tensor) -> KroneckerFactors:
    """Train on some of the images; their factors, calibrated."""
    optimizer = fit(net, x[mask], y[mask], tau=0.1, epochs=EPOCHS)
    factors = export(optimizer)
    optimizer.close()
    return calibrate(factors, net, [(x[mask], y[mask])], refit=1e-2)


# %%
# One task after the other
# ------------------------
# A network learns the digits 0 to 4, then 5 to 9. The penalty has a backward pass of its own.
# Beside it is the plain distance from the first weights, at the same strengths.

first, second = TASKS.values()
start = network()
factors = learn(start, first)


def continued(strength: float, *, curved: bool) -> tuple[float, float]:
    """Accuracies on both tasks, after the second."""
    net = copy.deepcopy(start)
    before = [p.detach().clone() for p in net.parameters()]
    remembered = ewc(factors, net)

    def distance() -> Tensor:
        pairs = zip(net.parameters(), before, strict=True)
        return torch.stack([(p - q).square().sum() for p, q in pairs]).sum() / 2

    penalty = remembered if curved else distance
    with SINGD(net, lr=1e-3, T=1, structures=("dense", "dense")) as optimizer:
        for _ in range(EPOCHS):
            for i in second.nonzero()[:, 0].split(50):
                optimizer.zero_grad()
                cross_entropy(net(x[i]), y[i]).backward()
                (strength * penalty()).backward()
                optimizer.step()
    return accuracy(net, TESTS["digits 0 to 4"]), accuracy(net, TESTS["digits 5 to 9"])


STRENGTHS = [0.0, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 30.0, 100.0]
paths = {
    name: [continued(strength, curved=curved) for strength in STRENGTHS]
    for name, curved in (("distance", False), ("curvature", True))
}
for name, path in paths.items():
    print(f"{name:10}", "  ".join(f"{a:.2f}/{b:.2f}" for a, b in path))

# %%
# Merged models
# -------------
# Two networks from one start learn a half of the digits each, and are merged: by the mean of their
# weights, and by their curvatures.

common = network()
fit(common, x[:100], y[:100], tau=0.1, epochs=EPOCHS).close()
models, curvatures = [], []
for mask in TASKS.values():
    model = copy.deepcopy(common)
    curvatures.append(learn(model, mask))
    models.append(model)
merged = {
    "the first": dict(models[0].named_parameters()),
    "the second": dict(models[1].named_parameters()),
    "mean": {
        name: (p + models[1].get_parameter(name)) / 2 for name, p in models[0].named_parameters()
    },
    "curvature": merge(models, curvatures),
}
results = {}
for name, parameters in merged.items():
    net = network()
    net.load_state_dict(parameters)
    results[name] = [accuracy(net, mask) for mask in TESTS.values()]
    print(f"{name:10}", "  ".join(f"{value:.3f}" for value in results[name]))

# %%
# The curvature leaves the second task the directions that the first does not need: whatever is kept
# of the first, more is learned of the second than by the plain distance. Merged by curvature, the
# two networks are better on both tasks than their mean.

fig, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
for name, path in paths.items():
    axes[0].plot(*zip(*path, strict=True), "o-", label=f"penalty: {name}")
axes[0].set(xlabel="accuracy on the first task", ylabel="accuracy on the second")
axes[0].legend()
for i, task in enumerate(TESTS):
    places = [k + 0.4 * i for k in range(len(results))]
    axes[1].bar(places, [values[i] for values in results.values()], 0.4, label=task)
axes[1].set_xticks([k + 0.2 for k in range(len(results))], list(results))
axes[1].set(ylabel="accuracy", ylim=(0, 1.3))
axes[1].legend()
plt.show()
