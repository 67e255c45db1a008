"""The Laplace approximation: a Gaussian over weights whose covariance is made of the factors.

With ``N`` samples, Fisher information ``S_C (x) S_K`` and prior ``N(0, I / tau)`` the posterior of
a weight is ``N(W, (N S_C (x) S_K + tau I)^-1)`` (Ritter et al., ICLR 2018; Daxberger et al., arXiv
2106.14806). Its root is ``(U_C (x) U_K) (N s_C (x) s_K + tau)^(-1/2)`` with eigenvectors ``U`` and
eigenvalues ``s``. Without a prior of its own it is ``N^(-1/2) C (x) K``: the damping that is folded
into the factors then is the prior, and nothing leaves their structures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from singd.factors.calibration import require_calibrated
from singd.factors.curvature import evaluated
from singd.factors.records import KroneckerFactors, WeightFactors
from singd.factors.weights import Function, Weights, columns, outputs
from singd.methods.options import in_range, integer
from structured import Dense, Diagonal, Kronecker, Operator, Product, StructuredMatrix

Precision = float | Tensor | Mapping[str, float | Tensor]


@dataclass(frozen=True)
class Predictive:
    """Gaussians over outputs: ``mean [N, k]`` and ``covariance [N, k, k]`` of each sample."""

    mean: Tensor
    covariance: Tensor

    @property
    def variance(self) -> Tensor:
        """``[N, k]``."""
        return self.covariance.diagonal(dim1=-2, dim2=-1)

    def probabilities(self) -> Tensor:
        """Class probabilities ``[N, k]`` where the outputs are logits.

        The softmax of ``mean / sqrt(1 + pi / 8 variance)`` (MacKay, Neural Computation 1992).
        """
        return (self.mean / (1 + torch.pi / 8 * self.variance).sqrt()).softmax(-1)


@dataclass(frozen=True)
class Spectrum:
    """``N S_C (x) S_K``: orthogonal ``U`` and eigenvalues ``values [..., d_out d_in]``."""

    U: Kronecker
    values: Tensor


@dataclass(frozen=True)
class Posterior:
    """A Gaussian around the weights that a model had; made by :func:`posterior`.

    Parameters without factors stay as they are.

    Attributes:
        weights: The matrices of the model.
        mean: Their values, by name.
        roots: ``R`` of each, with covariance ``R R^T`` of its rows in turn.
        prior: Prior precision of each; ``None`` if it is the damping of the factors.
        spectra: The curvature of each, if it has a prior.
    """

    weights: Weights
    mean: Mapping[str, Tensor]
    roots: Mapping[str, Operator]
    prior: Mapping[str, Tensor] | None
    spectra: Mapping[str, Spectrum]

    def sample(self, *, generator: Generator | None = None) -> dict[str, Tensor]:
        """Values of all parameters, for :func:`torch.func.functional_call`; two products a layer.

        Args:
            generator: Random numbers.
        """
        drawn = {
            name: W + self.roots[name].sample(1, generator=generator).reshape(W.shape)
            for name, W in self.mean.items()
        }
        with torch.no_grad():
            return self.weights.into(drawn, self.weights.values())

    def whiten(self, J: Mapping[str, Tensor]) -> Tensor:
        """``R^T J``, one row ``[m, P]`` for each derivative: inner products are covariances.

        Args:
            J: Derivatives ``[m, *shape]`` by each matrix.
        """
        rows = [
            R.apply_transpose(columns(J[name].to(R.dtype), self.mean[name].shape))
            for name, R in self.roots.items()
        ]
        return torch.cat([row.movedim(-1, 0).flatten(1) for row in rows], 1)

    def predict(
        self, x: Tensor, *, function: Function = outputs, chunk: int | None = 64
    ) -> Predictive:
        """The outputs of a model that is linear in its weights about their mean.

        Costs a backward pass for each output and derivatives of as many numbers as the weights.

        Args:
            x: Inputs ``[N, ...]``.
            function: Function of model and one sample ``[1, ...]``, with outputs ``[k]``.
            chunk: Number of samples at a time.

        Raises:
            ValueError: If there is no sample.
        """
        if not len(x):
            raise ValueError("x: expected one sample or more, got none")
        means, covariances = [], []
        for some in x.split(chunk or len(x)):
            J = self.weights.jacobians(function, some)
            k = next(iter(J.values())).shape[1]
            Z = self.whiten({name: one.flatten(0, 1) for name, one in J.items()})
            Z = Z.reshape(len(some), k, -1)
            covariances.append(Z @ Z.mT)
            with torch.no_grad(), evaluated(self.weights.model):
                model = self.weights.model
                means.append(torch.stack([function(model, one[None]) for one in some]))
        return Predictive(torch.cat(means).detach(), torch.cat(covariances))

    def log_marginal_likelihood(self, log_likelihood: float | Tensor) -> Tensor:
        """``log p(data)`` of the Laplace approximation, in nats, differentiable in the prior.

        Args:
            log_likelihood: ``log p(data | weights)``, the sum over all samples, at the mean.

        Raises:
            ValueError: If the posterior has no prior of its own.
        """
        total = torch.as_tensor(log_likelihood, dtype=torch.float64)
        for name, tau in self._priors("log_marginal_likelihood").items():
            s, W = self.spectra[name].values, self.mean[name].double()
            terms = tau.log() - (s + tau).log()
            total = total + 0.5 * (terms.sum() - tau * W.square().sum())
        return total

    def with_prior_precision(self, prior_precision: Precision) -> Posterior:
        """The posterior of another prior; no decomposition is made anew.

        Raises:
            ValueError: If the posterior has no prior of its own, or a precision is not positive.
        """
        self._priors("with_prior_precision")
        prior = _priors(prior_precision, self.spectra)
        like = {name: W.dtype for name, W in self.mean.items()}
        roots = {
            name: _root(spectrum, prior[name]).to(like[name])
            for name, spectrum in self.spectra.items()
        }
        return replace(self, roots=roots, prior=prior)

    def _priors(self, purpose: str) -> Mapping[str, Tensor]:
        if self.prior is None:
            raise ValueError(
                f"{purpose}: expected a posterior with a prior_precision, got one whose prior is "
                "the damping of its factors"
            )
        return self.prior


def posterior(
    factors: KroneckerFactors,
    model: nn.Module,
    prior_precision: Precision | None = None,
    n_data: int | None = None,
) -> Posterior:
    """The Gaussian over the weights of ``model`` that calibrated factors describe.

    Args:
        factors: What :func:`singd.factors.calibrate` returned.
        model: Model with the weights that they were calibrated at, a minimum of the loss.
        prior_precision: ``tau`` of the prior ``N(0, I / tau)``: one number, or one by the name of
            each weight; tensors are differentiated through. Weight decay ``gamma`` of a mean loss
            is ``tau = n_data gamma``. ``None``: the damping of the factors is the prior.
        n_data: Number of samples of the training data; those of the calibration if ``None``.

    With a prior, a side that is not diagonal is decomposed into dense eigenvectors, at n^3.

    Raises:
        ValueError: If the factors are not calibrated or not those of the model, or a number is out
            of range.
    """
    require_calibrated(factors, "posterior")
    N = factors.samples if n_data is None else n_data
    integer("n_data", N, 1)
    weights = Weights(factors, model)
    mean = weights.of(weights.values())
    if prior_precision is None:
        roots: dict[str, Any] = {name: one.root * N**-0.5 for name, one in factors.items()}
        roots = {name: R.to(mean[name].dtype) for name, R in roots.items()}
        return Posterior(weights, mean, roots, None, {})
    spectra = {name: spectrum(one, N) for name, one in factors.items()}
    start = {name: torch.ones(()) for name in spectra}
    return Posterior(weights, mean, {}, start, spectra).with_prior_precision(prior_precision)


def spectrum(one: WeightFactors, N: int) -> Spectrum:
    """``N S_C (x) S_K`` by eigenvalues, in float64: what the damping added is taken off."""
    if one.calibration is None:
        raise ValueError("spectrum: expected calibrated factors, got others")
    (U_K, s_K), (U_C, s_C) = (
        eigen(member.double(), d.double())
        for member, d in zip((one.K, one.C), one.calibration.damping, strict=True)
    )
    return Spectrum(Kronecker(U_C, U_K), N * (s_C[..., :, None] * s_K[..., None, :]).flatten(-2))


def eigen(K: StructuredMatrix, d: Tensor) -> tuple[StructuredMatrix, Tensor]:
    """Eigenvectors and eigenvalues of ``S = (K K^T)^-1 - d I``, none below zero."""
    if isinstance(K, Diagonal):
        P, U = K.d.square(), Diagonal(torch.ones_like(K.d))
        return U, (P.reciprocal() - d[..., None]).clamp(min=0.0)
    P, vectors = torch.linalg.eigh(K.outer().to_dense())
    return Dense(vectors), (P.reciprocal() - d[..., None]).clamp(min=0.0)


def _root(spectrum: Spectrum, tau: Tensor) -> Product:
    """``U (values + tau)^(-1/2)``."""
    return Product(spectrum.U, Diagonal((spectrum.values + tau).rsqrt()))


def _priors(given: Precision, names: Mapping[str, Any]) -> dict[str, Tensor]:
    found = {}
    for name in names:
        if isinstance(given, Mapping) and name not in given:
            raise ValueError(f"prior_precision: expected one for {name}, got {', '.join(given)}")
        tau = given[name] if isinstance(given, Mapping) else given
        in_range("prior_precision", tau, torch.finfo(torch.float64).tiny, float("inf"))
        found[name] = torch.as_tensor(tau, dtype=torch.float64)
    return found
