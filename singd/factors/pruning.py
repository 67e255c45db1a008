"""The optimal brain surgeon: what to remove, and how the other weights make up for it.

With ``S = C C^T (x) K K^T``, the inverse of the damped Fisher information of a weight at a minimum
of the loss, setting the numbers ``w_p`` of it to zero raises the loss of a sample by

    1/2 w_p^T (S_pp)^-1 w_p     if all others move by     -S_{:p} (S_pp)^-1 w_p

(Hassibi & Stork, NeurIPS 1992). For one number ``S_pp`` is one of the diagonal, for a row ``i`` it
is ``(C C^T)_ii K K^T``, for others it is never written out: its products are those of the factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from singd.factors import conjugate
from singd.factors.calibration import require_calibrated
from singd.factors.records import KroneckerFactors, WeightFactors
from singd.factors.weights import Weights
from singd.methods.options import in_range, integer
from singd.update import precondition


def weight_scores(factors: KroneckerFactors, model: nn.Module) -> dict[str, Tensor]:
    """What the loss of a sample rises by if a number of a weight is removed, ``w^2 / (2 S_ii)``.

    Args:
        factors: What :func:`singd.factors.calibrate` returned.
        model: Model with the weights.

    Returns:
        Scores by name, shaped like the weights; biases have none.

    Raises:
        ValueError: If the factors are not calibrated, or not those of the model.
    """
    require_calibrated(factors, "weight_scores")
    weights = Weights(factors, model)
    found = {}
    for name, W in weights.of(weights.values()).items():
        C, K = factors[name].C.double(), factors[name].K.double()
        diagonal = C.squared_rows()[..., :, None] * K.squared_rows()[..., None, :]
        scores = (W.double().square() / (2 * diagonal)).to(W.dtype)
        found[name] = weights.matrices[name].split(scores)[0]
    return found


def row_scores(
    factors: KroneckerFactors, model: nn.Module, size: int | Mapping[str, int] = 1
) -> dict[str, Tensor]:
    """What it rises by if rows are removed with their biases: neurons, channels, or heads.

    Args:
        factors: What :func:`singd.factors.calibrate` returned.
        model: Model with the weights.
        size: Number of consecutive rows that are removed together, or such numbers by the names of
            weights, as the width of a head; others have no score then.

    Returns:
        Scores ``[..., d_out / size]`` by name.

    Raises:
        ValueError: If the factors are not calibrated or not those of the model, or the number of
            rows is no multiple of ``size``.
    """
    require_calibrated(factors, "row_scores")
    weights = Weights(factors, model)
    sizes = size if isinstance(size, Mapping) else dict.fromkeys(factors, size)
    matrices = weights.of(weights.values())
    found = {}
    for name, s in sizes.items():
        if name not in matrices:
            raise ValueError(f"size: expected names among {', '.join(factors)}, got {name!r}")
        integer(f"size of {name}", s, 1)
        W, C, K = matrices[name].double(), factors[name].C.double(), factors[name].K.double()
        if C.n % s:
            raise ValueError(f"size of {name}: expected a divisor of {C.n} rows, got {s}")
        whitened = K.solve(W.mT).mT.unflatten(-2, (-1, s))  # [..., groups, s, d_in]
        CC = C.outer().to_dense().unflatten(-1, (-1, s)).unflatten(-3, (-1, s))
        blocks = CC.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)  # [..., groups, s, s]
        rises = (torch.linalg.solve(blocks, whitened) * whitened).sum((-2, -1))
        found[name] = (rises / 2).to(matrices[name].dtype)
    return found


def keep(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Masks of the highest scores: true for what is kept.

    Args:
        scores: Scores of any shapes by name, compared with each other.
        sparsity: Share of all numbers whose scores are lowest, in [0, 1].

    Raises:
        ValueError: If there are no scores, or ``sparsity`` is out of range.
    """
    in_range("sparsity", sparsity, 0.0, 1.0)
    if not scores:
        raise ValueError("scores: expected those of one weight or more, got none")
    flat = torch.cat([t.flatten() for t in scores.values()])
    order = torch.zeros_like(flat, dtype=torch.bool)
    order[flat.argsort(descending=True)[: len(flat) - round(sparsity * len(flat))]] = True
    parts = order.split([t.numel() for t in scores.values()])
    return {
        name: part.reshape(t.shape) for (name, t), part in zip(scores.items(), parts, strict=True)
    }


def prune(
    factors: KroneckerFactors, model: nn.Module, masks: Mapping[str, Tensor], *, update: bool = True
) -> float:
    """Set weights to zero, in place, and move the others to where the loss rises least.

    >>> prune(factors, model, keep(weight_scores(factors, model), sparsity=0.8))

    The damping of the factors holds the others near to where the loss is quadratic: 1e-2 of the
    mean curvature or more (``calibrate(..., refit=1e-2)``), for many weights at once.

    Args:
        factors: What :func:`singd.factors.calibrate` returned.
        model: Model, changed in place.
        masks: Masks by name, true for what is kept: shaped like the weight, or ``[..., d_out /
            size]`` for groups of consecutive rows, which are removed with their biases.
        update: Whether the other weights move.

    Returns:
        What the loss of a sample is expected to rise by.

    Raises:
        ValueError: If the factors are not calibrated or not those of the model, or a mask is of
            another shape.
    """
    require_calibrated(factors, "prune")
    weights = Weights(factors, model)
    values = weights.values()
    matrices = weights.of(values)
    rise, new = 0.0, {}
    for name, mask in masks.items():
        if name not in matrices:
            raise ValueError(f"masks: expected names among {', '.join(factors)}, got {name!r}")
        removed = ~_whole(weights, name, mask, matrices[name])
        W = matrices[name].double()
        cost, moved = _surgery(factors[name], W, removed, update)
        rise += cost
        new[name] = moved.to(matrices[name].dtype)
    with torch.no_grad():
        changed = weights.into(new, values)
        for name, p in model.named_parameters():
            if changed[name] is not values[name]:
                p.copy_(changed[name])
    return rise


def _whole(weights: Weights, name: str, mask: Tensor, W: Tensor) -> Tensor:
    """The mask of all numbers of a matrix: biases of rows that are kept stay."""
    matrix = weights.matrices[name]
    like = matrix.split(W)[0]
    if mask.dtype is not torch.bool:
        raise ValueError(f"mask of {name}: expected truth values, got {mask.dtype}")
    if mask.shape == like.shape:
        kept = torch.ones_like(W, dtype=torch.bool)
        d_in = W.shape[-1] - (matrix.bias is not None)
        kept[..., :d_in] = matrix.to_matrix(mask)
        return kept
    *batch, d_out, _ = W.shape
    groups = mask.shape[-1] if mask.ndim else 0
    if [*mask.shape[:-1]] != batch or not groups or d_out % groups:
        shapes = f"{list(like.shape)}, or {[*batch, d_out]} for rows"
        raise ValueError(f"mask of {name}: expected shape {shapes}, got {list(mask.shape)}")
    return mask.repeat_interleave(d_out // groups, -1)[..., None].expand_as(W)


def _surgery(one: WeightFactors, W: Tensor, removed: Tensor, update: bool) -> tuple[float, Tensor]:
    """What the loss rises by, and the weights: by products with the factors alone."""
    C, K = one.C.double(), one.K.double()
    w = torch.where(removed, W, 0.0)
    if not update:
        L: Any = one.root.to(torch.float64)
        return float(L.solve(w.flatten(-2)[..., None]).square().sum()) / 2, W - w

    def product(X: Tensor) -> Tensor:
        return precondition(K, C, X)

    diagonal = C.squared_rows()[..., :, None] * K.squared_rows()[..., None, :]
    multipliers = conjugate.solve(lambda X: torch.where(removed, product(X), 0.0), w, diagonal)
    moved = torch.where(removed, 0.0, W - product(multipliers))
    return float((w * multipliers).sum()) / 2, moved
