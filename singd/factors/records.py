"""Records of factors by the names of weights, and their files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from singd.capture.weight_matrix import WeightMatrix, find_weight_matrices
from singd.factors import files
from singd.layers import OPTIONAL
from structured import Kronecker, Structure, StructuredMatrix, parse

SIDES = ("K", "C")
FORMAT = "1"


@dataclass(frozen=True)
class Calibration:
    """What one pass over data said of the factors of a weight; numbers for K and for C.

    Of groups of a convolution all tensors have that batch dimension.

    Attributes:
        scale: ``a [...]``, by which ``K K^T`` and ``C C^T`` were multiplied.
        mean: ``tr(S_K) / n`` (and of ``S_C``), ``[...]``.
        damping: ``d [...]`` in ``K K^T ~ (S_K + d I)^-1``, in units of ``S_K`` (of ``S_C`` for C).
        residual: ``||Pi(K^T (S_K + d I) K) - I||_F / sqrt(n)``, ``[...]``: zero at the best factor
            of its structure, one at a factor of zero.
    """

    scale: tuple[Tensor, Tensor]
    mean: tuple[Tensor, Tensor]
    damping: tuple[Tensor, Tensor]
    residual: tuple[Tensor, Tensor]

    @property
    def relative_damping(self) -> tuple[float, float]:
        """The largest ``d / mean`` of K and of C."""
        K, C = (float((d / m).max()) for d, m in zip(self.damping, self.mean, strict=True))
        return K, C

    @property
    def worst_residual(self) -> tuple[float, float]:
        """The largest residual of K and of C."""
        K, C = (float(t.max()) for t in self.residual)
        return K, C


@dataclass(frozen=True)
class WeightFactors:
    """The factors of one weight ``W [..., d_out, d_in]``, its bias counted as the last input.

    The covariance of ``vec(W)``, the rows in turn, is modelled as the Kronecker product of ``C
    C^T`` and ``K K^T``, whose inverse is the Fisher information of one sample, damped. Before
    calibration it is that but for an unknown factor.

    Attributes:
        K: Root of the input side, ``[..., d_in, d_in]``.
        C: Root of the output side, ``[..., d_out, d_out]``.
        structures: The structures of K and C.
        bias: Name of the bias that is folded in, if there is one.
        approximation: ``"expand"`` or ``"reduce"``, how shared positions were counted.
        steps: Steps of the optimizer until now.
        calibration: What :func:`singd.factors.calibrate` found, if it was called.
    """

    K: StructuredMatrix
    C: StructuredMatrix
    structures: tuple[Structure, Structure]
    bias: str | None
    approximation: str
    steps: int
    calibration: Calibration | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """``(..., d_out, d_in)``, the bias counted as one more input."""
        return (*self.K.batch_shape, self.C.n, self.K.n)

    @property
    def root(self) -> Kronecker:
        """``C (x) K``: its product with ``vec(Z)`` is ``vec(C Z K^T)``."""
        return Kronecker(self.C, self.K)


class KroneckerFactors(Mapping[str, WeightFactors]):
    """Factors by the name of each weight; made by :func:`singd.export` or :meth:`load`.

    A matrix that is some rows of a weight, as one of packed queries, keys and values, has its label
    in its name: ``"attention.in_proj_weight[q]"``.

    Args:
        factors: The factors of each weight.
        samples: Number of samples of the calibration; 0 without one.
    """

    def __init__(self, factors: Mapping[str, WeightFactors], samples: int = 0) -> None:
        self._factors, self.samples = dict(factors), samples

    def __getitem__(self, name: str) -> WeightFactors:
        return self._factors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)

    @property
    def is_calibrated(self) -> bool:
        """Whether all factors have the scale of the curvature."""
        return all(one.calibration is not None for one in self.values())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} weights, {self.samples} samples)"

    def __str__(self) -> str:
        rows = [("weight", "shape", "structures", "damping / mean", "residual")]
        for name, one in self.items():
            found = ["not calibrated", ""]
            if one.calibration is not None:
                pairs = one.calibration.relative_damping, one.calibration.worst_residual
                found = [" ".join(f"{value:8.2g}" for value in pair) for pair in pairs]
            shape, specs = "x".join(map(str, one.shape)), ", ".join(map(str, one.structures))
            rows.append((name, shape, specs, found[0], found[1]))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        head, *body = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join([head, "-" * len(head), *body])

    # Models -------------------------------------------------------------------------------------

    def bind(self, model: nn.Module) -> dict[str, WeightMatrix]:
        """The matrices of ``model`` that the factors are of, by name.

        Raises:
            ValueError: If a weight is missing, of another shape, or has no bias that is folded in.
        """
        names = {p: plain(name) for name, p in model.named_parameters()}
        found = {plain(m.key): m for m in find_weight_matrices(model, names, (), [*OPTIONAL])}
        bound = {}
        for name, one in self.items():
            matrix = found.get(name)
            if matrix is None:
                known = ", ".join(found) or "none"
                raise ValueError(f"model: expected a weight {name}, got {known}")
            if one.bias is None:
                matrix = replace(matrix, bias=None)
            bias = None if matrix.bias is None else names[matrix.bias]
            expected, got = (one.shape, one.bias), (matrix.shape, bias)
            if expected != got:
                raise ValueError(f"{name}: expected shape and bias {expected}, got {got}")
            bound[name] = matrix
        return bound

    # Files --------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: tensors, with structures and counts as metadata.

        Raises:
            ModuleNotFoundError: If safetensors is not installed.
            ValueError: If a structure cannot be written as a spec.
        """
        tensors, weights = {}, {}
        for name, one in self.items():
            specs = [_spec(structure) for structure in one.structures]
            weights[name] = {
                "structures": specs,
                "shape": one.shape,
                "bias": one.bias,
                "approximation": one.approximation,
                "steps": one.steps,
            }
            for side, member in zip(SIDES, (one.K, one.C), strict=True):
                for i, t in enumerate(member.tensors()):
                    tensors[f"{name}.{side}.{i}"] = t.contiguous()
            for kind, pair in vars(one.calibration).items() if one.calibration else ():
                for side, t in zip(SIDES, pair, strict=True):
                    tensors[f"{name}.{side}.{kind}"] = t
        written = {"format": FORMAT, "samples": self.samples, "weights": weights}
        files.write(path, tensors, {"singd.factors": json.dumps(written)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Self:
        """Read what :meth:`save` wrote. Classes of structures of your own are defined before.

        Args:
            path: Name of the file.
            device: Device of the tensors.

        Raises:
            ModuleNotFoundError: If safetensors is not installed.
            ValueError: If it is no file of factors, or of a later version.
        """
        tensors, metadata = files.read(path, device)
        if "singd.factors" not in metadata:
            raise ValueError(
                f"{path}: expected a file that KroneckerFactors.save wrote, got another"
            )
        written = json.loads(metadata["singd.factors"])
        if written["format"] != FORMAT:
            raise ValueError(f"{path}: expected format {FORMAT}, got {written['format']}")
        factors = {name: _read(name, one, tensors) for name, one in written["weights"].items()}
        return cls(factors, written["samples"])


def plain(name: str) -> str:
    """The name of a parameter without what ``torch.compile`` adds."""
    return name.replace("_orig_mod.", "")


def _spec(structure: Structure) -> str:
    spec = str(structure)
    try:
        known = parse(spec) == structure
    except ValueError:
        known = False
    if not known:
        raise ValueError(f"save: expected structures that have a spec, got {structure!r}")
    return spec


def _read(name: str, written: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> WeightFactors:
    """The factors of one weight, from the tensors of a file."""
    *batch, d_out, d_in = written["shape"]
    structures = [parse(spec) for spec in written["structures"]]
    members = []
    for side, structure, n in zip(SIDES, structures, (d_in, d_out), strict=True):
        first = tensors[f"{name}.{side}.0"]
        like: dict[str, Any] = {"dtype": first.dtype, "device": first.device}
        zero = structure(n, batch_shape=batch, **like)
        count = len(zero.tensors())
        members.append(zero.with_tensors([tensors[f"{name}.{side}.{i}"] for i in range(count)]))
    found: dict[str, Any] = {
        kind: tuple(tensors[f"{name}.{side}.{kind}"] for side in SIDES)
        for kind in Calibration.__annotations__
        if f"{name}.K.{kind}" in tensors
    }
    return WeightFactors(
        members[0],
        members[1],
        (structures[0], structures[1]),
        written["bias"],
        written["approximation"],
        written["steps"],
        Calibration(**found) if found else None,
    )
