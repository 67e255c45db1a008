"""What training samples have to do with a prediction."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from singd.factors.posterior import Posterior
from singd.factors.weights import Function, outputs


def cross_entropy(model: Function, x: Tensor, y: Tensor) -> Tensor:
    """The loss of one sample with its label, a number."""
    return F.cross_entropy(model(x), y)


def influence(
    posterior: Posterior,
    samples: Sequence[Tensor],
    queries: Sequence[Tensor],
    *,
    loss: Function = cross_entropy,
    output: Function = outputs,
    chunk: int | None = 64,
) -> Tensor:
    """How much outputs would change without a training sample, ``[samples, queries, ...]``.

    Without sample i the minimum moves by about ``V g_i``, the gradient of its loss times the
    covariance of the weights, and an output with derivative J by ``J V g_i`` (Koh & Liang, ICML
    2017). It is the first order: of a sample with a large weight in the fit it is too small.

    Args:
        posterior: Posterior whose prior precision is that of the training: its covariance is the
            inverse Hessian of the whole loss.
        samples: Tensors ``[N, ...]`` of the training samples: inputs and labels.
        queries: Tensors ``[M, ...]`` that ``output`` takes.
        loss: Function of the model and one sample ``[1, ...]``: its share in the loss, a sum.
        output: Function of the model and one query: numbers ``[...]``, such as logits or a loss.
        chunk: Number of samples at a time.

    Raises:
        ValueError: If ``samples`` or ``queries`` is a tensor or has no sample.
    """
    for what, given in (("samples", samples), ("queries", queries)):
        if isinstance(given, Tensor) or not given or not all(map(len, given)):
            raise ValueError(f"{what}: expected a tuple of tensors with a sample or more")
    g = posterior.whiten(posterior.weights.jacobians(loss, *samples, chunk=chunk))
    J = posterior.weights.jacobians(output, *queries, chunk=chunk)
    name = next(iter(J))
    shape = J[name].shape[: J[name].ndim - posterior.mean[name].ndim]
    rows = {key: t.reshape(-1, *posterior.mean[key].shape) for key, t in J.items()}
    return (g @ posterior.whiten(rows).mT).reshape(len(g), *shape)
