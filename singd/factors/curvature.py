"""Kronecker factors of the Fisher information of a model, averaged over data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from singd.capture.statistics import Columns, Side, Statistic
from singd.factors.records import KroneckerFactors, WeightFactors, plain
from singd.layers import OPTIONAL
from singd.methods.base import Averages, Method, Options, Products
from singd.methods.covariances import Covariances
from singd.methods.options import choice
from singd.optimizer import KroneckerOptimizer
from structured import Structure, parse

LIKELIHOODS = ("classification", "regression")

Forward = Callable[[nn.Module, Any], Tensor]
"""``forward(model, batch)``: the outputs ``[N, ..., k]`` for a batch of a loader."""


class FisherFactors(Method):
    """Averages Kronecker factors of the Fisher information, and leaves gradients as they are.

    Args:
        structures: Structures of the statistics of K and C by the name of each weight.
    """

    def __init__(self, structures: Mapping[str, tuple[Structure, Structure]]) -> None:
        self._structures = structures

    def structures(
        self, name: str, shape: Sequence[int], input_structure: str | None, options: Options
    ) -> tuple[Structure, ...]:
        """Those that were given for this weight, or of any one of its packed matrices."""
        return next(v for k, v in self._structures.items() if k.partition("[")[0] == name)

    def init(
        self, shape: Sequence[int], structures: Sequence[Structure], options: Options, **like: Any
    ) -> Covariances:
        """Zeros, in float32 at least."""
        return Covariances.zeros(shape, structures, **like)

    def summarize(
        self, factors: Covariances, side: Side, columns: Columns, options: Options
    ) -> Statistic:
        """``Pi(S)``."""
        return factors.summarize(side, columns)

    def update(
        self, factors: Covariances, statistics: Averages, options: Options, step: int
    ) -> Covariances:
        """A mean over all samples, of which this batch has the share ``options["share"]``."""
        share = options["share"]
        pairs = ((factors.S_K, statistics.input.value), (factors.S_C, statistics.grad.value))
        return Covariances(*((1 - share) * S + share * new for S, new in pairs))

    def precondition(self, factors: Covariances, G: Tensor, products: Products) -> Tensor:
        """The gradient."""
        return G.clone()


def first_of(model: nn.Module, batch: Any) -> Tensor:
    """``model`` of a batch, or of the first of its parts."""
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


def average(
    factors: KroneckerFactors,
    model: nn.Module,
    loader: Iterable[Any],
    *,
    likelihood: str,
    forward: Forward,
    columns: int | None,
    whole: bool,
    generator: torch.Generator | None,
) -> tuple[dict[str, Covariances], int]:
    """``S_K`` and ``S_C`` of every weight, and the number of samples, of a model in ``eval`` mode.

    Arguments are those of :func:`singd.factors.calibrate`. The structures of the factors decide
    what is summed; it is ``whole`` where roots will be made of it.
    """
    choice("likelihood", likelihood, LIKELIHOODS)
    matrices = factors.bind(model)
    params = {p: None for matrix in matrices.values() for p in matrix.parameters}
    statistics = {name: _statistics(one, whole) for name, one in factors.items()}
    approximations = {one.approximation for one in factors.values()}
    if len(approximations) > 1:
        raise ValueError(f"factors: expected one approximation, got {sorted(approximations)}")
    options = {"T": 1, "loss_average": None, "share": 1.0, "kfac_approx": approximations.pop()}
    method = FisherFactors(statistics)
    samples = 0
    with (
        trainable([*params]),
        KroneckerOptimizer(
            model, method, [*params], options, layers=[*OPTIONAL], max_skipped=1
        ) as optimizer,
        evaluated(model),
    ):
        optimizer.zero_grad()
        for batch in loader:
            f = forward(model, batch)
            N = f.shape[0]
            if not N:
                continue
            samples += N
            optimizer.param_groups[0]["share"] = N / samples
            for g in hessian_roots(f.detach(), likelihood, columns, generator):
                torch.autograd.backward(f, g / N**0.5, retain_graph=True, inputs=[*params])
            optimizer.precondition()
            optimizer.zero_grad()
        if not samples:
            raise ValueError("loader: expected at least one batch, got none")
        found: dict[str, Any] = {
            plain(held.matrix.key): held.factors for held in optimizer.stored_factors()
        }
    missing = [name for name in factors if name not in found]
    if missing:
        raise ValueError(
            f"model: expected the uses of {', '.join(missing)} that its layer describes"
        )
    return {name: found[name] for name in factors}, samples


def _statistics(one: WeightFactors, whole: bool) -> tuple[Structure, Structure]:
    """The structures of what is summed: those of the factors, where ``Pi(S)`` says enough."""
    K, C = (
        structure
        if member.closed_under_transpose or (member.closed_under_congruence and not whole)
        else parse("dense")
        for member, structure in zip((one.K, one.C), one.structures, strict=True)
    )
    return K, C


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` with gradients, and every module as it was when this ends."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def trainable(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Gradients of parameters, frozen ones too, until this ends."""
    frozen = [p for p in parameters if not p.requires_grad]
    for p in frozen:
        p.requires_grad_()
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def hessian_roots(
    f: Tensor, likelihood: str, columns: int | None, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """Columns ``g`` like ``f [N, ..., k]`` whose ``sum_c g g^T`` is the Hessian of the loss in f.

    ``diag(p) - p p^T`` of a softmax with probabilities p, or the identity of half the squared
    error. Random ones have it as the mean.
    """
    k = f.shape[-1]
    p, eye = f.softmax(-1), torch.eye(k, dtype=f.dtype, device=f.device)
    gaussian = likelihood == "regression"
    if columns is None:
        for c, one in enumerate(eye):
            yield one.expand_as(f) if gaussian else p[..., c, None].sqrt() * (one - p)
        return
    for _ in range(columns):
        if gaussian:
            g = torch.empty_like(f).normal_(generator=generator)
        else:
            labels = torch.multinomial(p.flatten(0, -2), 1, generator=generator)
            g = eye[labels.reshape(f.shape[:-1])] - p
        yield g / columns**0.5
