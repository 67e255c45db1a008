"""Trained factors in the objects of laplace-torch and curvlinops, which need not be installed."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from singd.factors.calibration import require_calibrated
from singd.factors.posterior import eigen
from singd.factors.records import KroneckerFactors
from singd.factors.weights import Weights
from structured import Outer


def to_laplace(
    factors: KroneckerFactors,
    model: nn.Module,
    n_outputs: int,
    *,
    likelihood: str = "classification",
    log_likelihood: float = 0.0,
    **options: Any,
) -> Any:
    """A ``laplace.KronLaplace`` of all weights, as if it had been fitted.

    There the bias is a block of its own: what it has to do with its weight is left out.

    Args:
        factors: What :func:`singd.factors.calibrate` returned.
        model: Model with the weights; the factors are of all its trainable parameters.
        n_outputs: Number of outputs.
        likelihood: ``"classification"`` or ``"regression"``.
        log_likelihood: ``log p(data | weights)``, for the marginal likelihood there.
        options: Further arguments of ``KronLaplace``, such as ``prior_precision``.

    Raises:
        ModuleNotFoundError: If laplace-torch is not installed.
        ValueError: If the factors are not calibrated or not those of the model, or a parameter has
            none or has groups, which Kronecker products of laplace-torch cannot hold.
    """
    laplace = _package("laplace", "laplace-torch")
    require_calibrated(factors, "to_laplace")
    blocks: dict[Tensor, list[Tensor]] = {}
    for name, matrix in factors.bind(model).items():
        one = factors[name]
        if len(one.shape) > 2 or matrix.rows is not None or one.calibration is None:
            raise ValueError(f"to_laplace: expected whole weights without groups, got {name}")
        sides = zip((one.K, one.C), one.calibration.damping, strict=True)
        pairs = [eigen(member.double(), d) for member, d in sides]
        S_K, S_C = ((U.to_dense() * s) @ U.to_dense().mT for U, s in pairs)
        S_K, S_C = S_K.to(matrix.weight.dtype), factors.samples * S_C.to(matrix.weight.dtype)
        d_in = S_K.shape[-1] - (matrix.bias is not None)
        blocks[matrix.weight] = [S_C, S_K[:d_in, :d_in]]
        if matrix.bias is not None:
            blocks[matrix.bias] = [S_C * S_K[-1, -1]]
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    missing = [name for name, p in trained if p not in blocks]
    if missing:
        raise ValueError(
            f"to_laplace: expected factors of every parameter that requires a gradient, got none "
            f"of {', '.join(missing)}"
        )
    found = laplace.KronLaplace(model, likelihood, **options)
    found.H_facs = laplace.utils.matrix.Kron([blocks[p] for _, p in trained])
    found.H = found.H_facs.decompose(damping=found.damping)
    found.mean = nn.utils.parameters_to_vector([p for _, p in trained]).detach()
    found.loss, found.n_data, found.n_outputs = -log_likelihood, factors.samples, n_outputs
    model.output_size = n_outputs  # type: ignore[assignment]  # where laplace-torch looks for it
    return found


def to_curvlinops(factors: KroneckerFactors, model: nn.Module, *, inverse: bool = False) -> Any:
    """The damped Fisher information of one sample as a linear operator of curvlinops.

    It acts on tensors shaped like the parameters with factors, in the order of the model.

    Args:
        factors: What :func:`singd.factors.calibrate` returned.
        model: Model with the weights.
        inverse: Whether it is the inverse, whose products are two with each factor.

    Raises:
        ModuleNotFoundError: If curvlinops-for-pytorch is not installed.
        ValueError: If the factors are not calibrated or not those of the model.
    """
    base = _package("curvlinops._torch_base", "curvlinops-for-pytorch").PyTorchLinearOperator
    require_calibrated(factors, "to_curvlinops")
    weights = Weights(factors, model)
    ours = {p for matrix in weights.matrices.values() for p in matrix.parameters}
    like = {name: p.detach() for name, p in model.named_parameters() if p in ours}
    covariances = {name: Outer(one.root) for name, one in factors.items()}

    def product(values: dict[str, Tensor]) -> dict[str, Tensor]:
        new = {}
        for name, X in weights.of(values).items():
            S = covariances[name].to(X.dtype)
            vector = X.flatten(-2)[..., None]
            new[name] = (S.apply(vector) if inverse else S.solve(vector)).reshape(X.shape)
        return weights.into(new, values)

    class Factored(base):  # type: ignore[misc, valid-type]  # of a package without types
        SELF_ADJOINT = True

        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            columns = zip(*(t.unbind(-1) for t in X), strict=True)
            made = [product(dict(zip(like, one, strict=True))) for one in columns]
            return [torch.stack([each[name] for each in made], -1) for name in like]

        @property
        def device(self) -> torch.device:
            return next(iter(like.values())).device

        @property
        def dtype(self) -> torch.dtype:
            return next(iter(like.values())).dtype

    shapes = [tuple(t.shape) for t in like.values()]
    return Factored(shapes, shapes)


def _package(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{name}: expected it to be installed, got {error}") from error
