r"""
How sure is a network? A posterior from trained factors
=======================================================

What SINGD has learned when training ends are roots of the inverse curvature,
:math:`K K^T \approx S_K^{-1}` and :math:`C C^T \approx S_C^{-1}`. With :math:`N` samples and the
prior :math:`\mathcal N(0, I / \tau)` they are the covariance of the weights,

.. math:: (N \, S_C \otimes S_K + \tau I)^{-1} ,

the Laplace approximation (Ritter et al., ICLR 2018). Here it is measured whether that makes a
network of digits better calibrated: on the images it knows, and on images that get worse.
"""

from __future__ import annotations

import importlib.util

import matplotlib.pyplot as plt
import torch
from digits import fit, images, network
from torch import Tensor
from torch.nn.functional import cross_entropy, nll_loss
from torch.utils.data import DataLoader, TensorDataset

from singd import export
from singd.factors import calibrate, posterior

torch.set_num_threads(1)  # the network is small
torch.manual_seed(0)

# %%
# Training
# --------
# One label in five is replaced by a random one: a network that fits them all is too sure. The prior
# is that of a weight decay of :math:`\tau / N`.

EPOCHS = 40
x, y, test_x, test_y = images()
generator = torch.Generator().manual_seed(5)


def noisy(labels: Tensor) -> Tensor:
    random = torch.randint(10, labels.shape, generator=generator)
    return torch.where(torch.rand(labels.shape, generator=generator) < 0.2, random, labels)


y, test_y = noisy(y), noisy(test_y)
net = network()
optimizer = fit(net, x, y, tau=0.3, epochs=EPOCHS)

# %%
# Calibration
# -----------
# ``export`` copies the factors. Their scale is unknown, and they are of the last batches: one pass
# over the data sets the scale, and the table says how far each factor is from the curvature at the
# final weights. Below 0.3 it may be used. ``refit`` gives the best factors that there are instead.

loader = [(x[i], y[i]) for i in torch.arange(len(x)).split(100)]
factors = export(optimizer)
trained = calibrate(factors, net, loader)
print(trained)
best = calibrate(factors, net, loader, refit=1e-3)

# %%
# The prior precision
# -------------------
# The evidence :math:`\log p(\text{data})` can be differentiated in :math:`\tau`; a few steps of
# gradient ascent in :math:`\log \tau` find its maximum, without data kept aside.

with torch.no_grad():
    log_likelihood = -cross_entropy(net(x), y, reduction="sum")

posteriors = {}
for name, calibrated in (("trained factors", trained), ("refitted factors", best)):
    log_tau = torch.zeros((), dtype=torch.float64, requires_grad=True)
    start = posterior(calibrated, net, prior_precision=1.0)
    ascent = torch.optim.Rprop([log_tau], lr=0.1, maximize=True)
    for _ in range(30):
        ascent.zero_grad()
        start.with_prior_precision(log_tau.exp()).log_marginal_likelihood(log_likelihood).backward()
        ascent.step()
    tau = log_tau.exp().item()
    posteriors[name] = start.with_prior_precision(tau)
    evidence = posteriors[name].log_marginal_likelihood(log_likelihood).item()
    print(f"{name:17} tau = {tau:.2f}  log p(data) = {evidence:.1f}")

# %%
# Calibration of the classes
# --------------------------
# Predictions are Gaussian in the logits, by linearising the network; ``probabilities`` takes the
# softmax under it. Noise of growing size is added to the test images.


def expected_calibration_error(p: Tensor, labels: Tensor, bins: int = 15) -> float:
    """The gap between confidence and accuracy, averaged over bins of confidence."""
    confidence, predicted = p.max(1)
    correct, error = (predicted == labels).float(), 0.0
    for i in range(bins):
        inside = (confidence > i / bins) & (confidence <= (i + 1) / bins)
        if inside.any():
            gap = (correct[inside].mean() - confidence[inside].mean()).abs()
            error += float(inside.float().mean() * gap)
    return error


laplace = None
if importlib.util.find_spec("laplace"):  # laplace-torch, which fits factors of its own
    from laplace import Laplace

    laplace = Laplace(net, "classification", subset_of_weights="all", hessian_structure="kron")
    laplace.fit(DataLoader(TensorDataset(x, y), batch_size=100))
    laplace.optimize_prior_precision(method="marglik")

NOISE = [0.0, 0.25, 0.5, 0.75, 1.0]
measured: dict[str, list[tuple[float, float]]] = {}
for size in NOISE:
    corrupted = test_x + size * torch.randn(test_x.shape, generator=generator)
    with torch.no_grad():
        predictions = {"MAP": net(corrupted).softmax(1)}
    for name, gaussian in posteriors.items():
        predictions[name] = gaussian.predict(corrupted).probabilities()
    if laplace is not None:
        predictions["laplace-torch"] = laplace(corrupted, link_approx="probit").detach()
    for name, p in predictions.items():
        nll, ece = nll_loss(p.log(), test_y).item(), expected_calibration_error(p, test_y)
        measured.setdefault(name, []).append((nll, ece))
        print(f"noise {size:.2f}  {name:17} NLL {nll:.3f}  ECE {ece:.3f}")

# %%
# On images like those of the training the most probable weights are calibrated better: the
# posterior is too unsure, as a linearised network with all weights uncertain usually is. As images
# get worse, the single network becomes sure of wrong classes, and the posterior does not. The
# trained factors do as well as refitted ones.

fig, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
for axis, which, label in ((axes[0], 0, "negative log-likelihood"), (axes[1], 1, "ECE")):
    for name, numbers in measured.items():
        axis.plot(NOISE, [pair[which] for pair in numbers], "o-", label=name)
    axis.set(xlabel="noise of the test images", ylabel=label)
axes[0].legend()
plt.show()
