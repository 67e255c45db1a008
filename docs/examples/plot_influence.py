r"""
Which training samples made this prediction?
============================================

Without sample :math:`i` the most probable weights move by about :math:`V g_i`, the covariance of
the posterior times the gradient of the sample's loss (Koh & Liang, ICML 2017). So trained factors
say what each of many samples has to do with a prediction, where training again says it of one.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from digits import fit, images, network
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from singd import export
from singd.factors import calibrate, influence, posterior

torch.set_num_threads(1)  # the network is small
torch.manual_seed(0)

# %%
# A network at its minimum
# ------------------------
# 150 images, of which 15 have a wrong label. SINGD trains, and L-BFGS goes on until nothing moves,
# so that what changes without a sample is due to the sample alone.

SAMPLES, WRONG, EPOCHS, REMOVED = 150, 15, 40, 20
TAU = 2.0
x, y, test_x, test_y = images(SAMPLES)
wrong = torch.randperm(SAMPLES)[:WRONG]
y[wrong] = (y[wrong] + torch.randint(1, 10, (WRONG,))) % 10
net = network()
optimizer = fit(net, x, y, tau=TAU, epochs=EPOCHS)
factors = export(optimizer)
optimizer.close()


def settle(net: nn.Module, x: Tensor, y: Tensor) -> None:
    """To the minimum of the loss with the prior."""
    lbfgs = torch.optim.LBFGS(
        net.parameters(), max_iter=150, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        lbfgs.zero_grad()
        loss = cross_entropy(net(x), y, reduction="sum")
        loss = loss + TAU / 2 * sum(p.square().sum() for p in net.parameters())
        loss.backward()
        return loss

    lbfgs.step(closure)


net.double()
x, test_x = x.double(), test_x.double()
settle(net, x, y)
factors = calibrate(factors, net, [(x, y)], refit=1e-4)
gaussian = posterior(factors, net, prior_precision=TAU)

# %%
# Against training again
# ----------------------
# The change of the loss of 20 test images is predicted for all samples, and measured for the 10
# samples with the largest predicted change and 10 others.

QUERIES = 20


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model(x), y)


queries = test_x[:QUERIES], test_y[:QUERIES]
predicted = influence(gaussian, (x, y), queries, output=loss_of).mean(1)
order = predicted.abs().argsort(descending=True)
top, others = order.split([REMOVED // 2, SAMPLES - REMOVED // 2])
removed = torch.cat([top, others[torch.randperm(len(others))[: REMOVED // 2]]])
start = {name: p.clone() for name, p in net.state_dict().items()}


def test_loss() -> float:
    with torch.no_grad():
        return cross_entropy(net(queries[0]), queries[1]).item()


before, changes = test_loss(), []
for i in removed.tolist():
    rest = torch.arange(SAMPLES) != i
    settle(net, x[rest], y[rest])
    changes.append(test_loss() - before)
    net.load_state_dict(start)
measured = torch.tensor(changes, dtype=torch.float64)
both = torch.stack([predicted[removed], measured])
correlation, slope = both.corrcoef()[0, 1], both.prod(0).sum() / both[0].square().sum()
print(f"correlation {correlation:.3f}, slope {slope:.2f}")

# %%
# Wrong labels
# ------------
# A sample whose own loss depends most on itself is one that the others contradict. Going through
# the samples in that order finds wrong labels.

own = influence(gaussian, (x, y), (x, y), output=loss_of).diagonal()
with torch.no_grad():
    losses = cross_entropy(net(x), y, reduction="none")
is_wrong = torch.isin(torch.arange(SAMPLES), wrong)
found = {
    "by influence": is_wrong[own.argsort(descending=True)].cumsum(0),
    "by loss": is_wrong[losses.argsort(descending=True)].cumsum(0),
}
for name, counts in found.items():
    print(f"{name:13} {int(counts[WRONG - 1])} of {WRONG} wrong labels among the first {WRONG}")

# %%
# The predicted changes follow the measured ones, and are too large: the curvature between the
# layers is left out. For a linear model with squared errors they are exact but for a factor, as the
# tests check. A sample's loss alone finds wrong labels as well.

fig, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
axes[0].plot(both[0], both[1], ".")
axes[0].axline((0, 0), slope=1, color="0.7", zorder=0)
axes[0].set(xlabel="predicted change of the test loss", ylabel="measured, by training again")
for name, counts in found.items():
    axes[1].plot(range(1, SAMPLES + 1), counts / WRONG, label=name)
axes[1].plot([1, SAMPLES], [0, 1], ":", color="0.7", label="at random")
axes[1].set(xlabel="samples looked at", ylabel="share of wrong labels found")
axes[1].legend()
plt.show()
