"""Weights of several tasks: a penalty that remembers one, and models merged by their curvature."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from singd.factors import conjugate
from singd.factors.calibration import require_calibrated
from singd.factors.records import KroneckerFactors
from singd.factors.weights import Weights
from singd.methods.options import in_range
from structured import Outer


def ewc(factors: KroneckerFactors, model: nn.Module) -> Callable[[], Tensor]:
    """Elastic weight consolidation: what the loss of the task rises by as weights leave it.

    >>> penalty = ewc(factors, model)  # after the first task
    >>> loss_func(model(X), y).backward()
    >>> (strength * penalty()).backward()

    ``1/2 ||C^-1 (W - W*) K^-T||_F^2`` summed over weights, with the weights ``W*`` that ``model``
    has now: the rise of the mean loss of a sample to second order, damped (Kirkpatrick et al., PNAS
    2017, with Kronecker factors for a diagonal: Ritter et al., NeurIPS 2018). The penalty has a
    backward pass of its own, since an optimizer of this package checks that the layers of a pass
    explain its gradients.

    Args:
        factors: What :func:`singd.factors.calibrate` returned for the task.
        model: Model with the weights of the task.

    Returns:
        A function without arguments: the penalty of the model's weights at that time, a number that
        is differentiated through.

    Raises:
        ValueError: If the factors are not calibrated, or not those of the model.
    """
    require_calibrated(factors, "ewc")
    weights = Weights(factors, model)
    means = {name: W.clone() for name, W in weights.of(weights.values()).items()}
    inverses = {
        name: one.root.to(torch.float64).inverse().to(means[name].dtype)
        for name, one in factors.items()
    }

    def penalty() -> Tensor:
        total = torch.zeros(())
        for name, W in weights.of(dict(model.named_parameters())).items():
            left = inverses[name].apply((W - means[name]).flatten(-2)[..., None])
            total = total + left.square().sum() / 2
        return total

    return penalty


def merge(
    models: Sequence[nn.Module],
    factors: Sequence[KroneckerFactors],
    weights: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """Parameters at the minimum of the sum of the quadratic models of several losses.

    Every weight is ``(sum_m c_m F_m)^-1 sum_m c_m F_m W_m`` with the damped Fisher information
    ``F_m = (C C^T)^-1 (x) (K K^T)^-1`` of each model (Matena & Raffel, NeurIPS 2022, with whole
    Kronecker products: Tam et al., arXiv 2312.04339). Parameters without factors are averaged.

    Args:
        models: Models of one architecture.
        factors: The calibrated factors of each.
        weights: ``c_m``, of each model; its number of samples by default.

    Returns:
        Parameters by name, for ``load_state_dict(..., strict=False)``.

    Raises:
        ValueError: If the factors are not calibrated, not those of the models, or of other weights.
    """
    if not models or len(models) != len(factors):
        raise ValueError(
            f"merge: expected as many factors as {len(models)} models, got {len(factors)}"
        )
    for one in factors:
        require_calibrated(one, "merge")
    if any({*one} != {*factors[0]} for one in factors):
        raise ValueError("merge: expected factors of the same weights, got others")
    given = [float(one.samples) for one in factors] if weights is None else list(weights)
    if len(given) != len(models):
        raise ValueError(f"weights: expected {len(models)} numbers, got {len(given)}")
    for c in given:
        in_range("weights", c, torch.finfo(torch.float64).tiny, float("inf"))
    share = [c / sum(given) for c in given]
    bound = [Weights(one, model) for one, model in zip(factors, models, strict=True)]
    values = [weights.values() for weights in bound]
    matrices = [weights.of(v) for weights, v in zip(bound, values, strict=True)]
    average = {
        name: sum((c * v[name] for c, v in zip(share, values, strict=True)), torch.zeros(()))
        for name in values[0]
    }
    merged = {}
    for name, W in matrices[0].items():
        curvatures = [Outer(one[name].root.to(torch.float64).inverse().mT) for one in factors]
        ours = [m[name].double() for m in matrices]
        merged[name] = _minimum(curvatures, share, ours).to(W.dtype)
    return bound[0].into(merged, {name: t.to(values[0][name].dtype) for name, t in average.items()})


def _minimum(F: Sequence[Outer], share: Sequence[float], W: Sequence[Tensor]) -> Tensor:
    """``(sum c F)^-1 sum c F W``, by how far it is from the mean of the weights."""
    vectors = [w.flatten(-2)[..., None] for w in W]
    mean = sum(c * v for c, v in zip(share, vectors, strict=True))

    def product(X: Tensor) -> Tensor:
        return torch.stack([c * A.apply(X) for c, A in zip(share, F, strict=True)]).sum(0)

    terms = [c * A.apply(v - mean) for c, A, v in zip(share, F, vectors, strict=True)]
    right = torch.stack(terms).sum(0)
    diagonal = torch.stack([c * A.diagonal() for c, A in zip(share, F, strict=True)]).sum(0)
    return (mean + conjugate.solve(product, right, diagonal[..., None])).reshape(W[0].shape)
