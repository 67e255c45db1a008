"""The matrices that are preconditioned: parameters, or rows of parameters, of known layers."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from singd.layers import Layer, find_products
from singd.layers.base import ParameterTensor


@dataclass(frozen=True, eq=False)
class WeightMatrix:
    """A weight, or some of its rows, as one matrix ``[..., d_out, d_in]`` of a layer."""

    name: str  # of the weight in the model
    modules: tuple[nn.Module, ...]  # several if they share the weight
    layer: Layer
    weight: nn.Parameter
    bias: nn.Parameter | None
    rows: slice | None = None  # of weight and bias; all if None
    label: str = ""  # of this matrix among those of one weight

    @property
    def module(self) -> nn.Module:
        """The module, or the first of those that share the weight."""
        return self.modules[0]

    @property
    def key(self) -> str:
        """A name of its own: that of the weight, and the label."""
        return f"{self.name}[{self.label}]" if self.label else self.name

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """``(..., d_out, d_in)``, the bias counted as one more input."""
        *batch, d_out, d_in = self.layer.shape(self.module)
        return (*batch, d_out, d_in + (self.bias is not None))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Weight and bias, if there is one."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def has_gradient(self) -> bool:
        """Whether weight or bias has a gradient."""
        return any(p.grad is not None for p in self.parameters)

    def part(self, t: Tensor) -> Tensor:
        """The rows of this matrix in something shaped like the weight or the bias, a view."""
        return t if self.rows is None else t[self.rows]

    def part_shape(self, p: Tensor) -> torch.Size:
        """The shape of :meth:`part`, also of a sharded parameter."""
        if self.rows is None:
            return p.shape
        return torch.Size([len(range(p.shape[0])[self.rows]), *p.shape[1:]])

    @property
    def is_reshaped(self) -> bool:
        """Whether the matrix is the weight in another shape, its numbers in the same order."""
        own = type(self.layer)
        return (own.to_matrix, own.from_matrix) == (Layer.to_matrix, Layer.from_matrix)

    @functools.cached_property
    def _is_plain(self) -> bool:
        """Whether the weight is its own matrix: asking the layer takes longer."""
        shape = tuple(self.part_shape(self.weight))
        return self.is_reshaped and self.layer.shape(self.module) == shape

    def to_matrix(self, weight: Tensor) -> Tensor:
        """A :meth:`part` of the weight, or of its gradient, as ``[..., d_out, d_in]``."""
        return weight if self._is_plain else self.layer.to_matrix(self.module, weight)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`to_matrix`."""
        return matrix if self._is_plain else self.layer.from_matrix(self.module, matrix)

    def gradients(self, whole: Mapping[Tensor, Tensor]) -> list[Tensor]:
        """The parts of the gradients of weight and bias; zero where there is none.

        Those in ``whole`` take the place of ``p.grad``, of parameters that are sharded.
        """
        return [
            torch.zeros(self.part_shape(p), dtype=p.dtype, device=p.device)
            if p.grad is None
            else self.part(whole.get(p, p.grad))
            for p in self.parameters
        ]

    def split(self, matrix: Tensor) -> list[Tensor]:
        """``[..., d_out, d_in]`` as views shaped like the parts of :attr:`parameters`."""
        if self.bias is None:
            return [self.from_matrix(matrix)]
        return self.shaped(matrix[..., :-1], matrix[..., -1])

    def shaped(self, weight: Tensor, bias: Tensor) -> list[Tensor]:
        """``[..., d_out, d_in]`` without the bias, and ``[..., d_out]``, shaped likewise."""
        return [self.from_matrix(weight), bias.reshape(self._bias_shape)]

    @functools.cached_property
    def _bias_shape(self) -> tuple[int, ...]:
        return () if self.bias is None else tuple(self.part_shape(self.bias))


def stack_gradients(
    matrices: Sequence[WeightMatrix], whole: Mapping[Tensor, Tensor] = MappingProxyType({})
) -> Tensor:
    """The gradients of equal matrices, ``[matrices, ..., d_out, d_in]``, with those of biases.

    May share memory with a gradient; ``whole`` as for :meth:`WeightMatrix.gradients`.
    """
    return stack_parts(matrices, [matrix.gradients(whole) for matrix in matrices])


def stack_apart(matrices: Sequence[WeightMatrix]) -> list[Tensor]:
    """Gradients of equal matrices, ``[matrices, ..., d_out, columns]``: weights, and biases apart.

    May share memory with gradients.
    """
    *batch, d_out, _ = matrices[0].shape
    parts = [matrix.gradients({}) for matrix in matrices]
    weights = _stack([m.to_matrix(part[0]) for m, part in zip(matrices, parts, strict=True)])
    biases = _stack([part[1] for part in parts]).reshape(len(parts), *batch, d_out, 1)
    return [weights, biases.to(weights.dtype)]


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def stack_parts(matrices: Sequence[WeightMatrix], parts: Sequence[Sequence[Tensor]]) -> Tensor:
    """Equal matrices ``[matrices, ..., d_out, d_in]`` of their parts, weight and bias.

    May share memory with a part.
    """
    first = matrices[0]
    weights = [m.to_matrix(part[0]) for m, part in zip(matrices, parts, strict=True)]
    if first.bias is None:
        return _stack(weights)
    *batch, d_out, _ = first.shape
    biases = [part[1].reshape(*batch, d_out, 1) for part in parts]
    out = weights[0].new_empty((len(matrices), *first.shape))
    slots = (*out[..., :-1].unbind(), *out[..., -1:].unbind())
    torch._foreach_copy_(slots, [*weights, *biases])
    return out


def find_weight_matrices(
    model: nn.Module,
    given: Collection[Tensor],
    taken: Collection[Tensor],
    optional: Collection[type[nn.Module]],
) -> list[WeightMatrix]:
    """Supported layers of ``model`` with a weight among ``given``, none of it ``taken``.

    A weight shared by several layers is one matrix if all read it alike; otherwise, or if it is a
    parameter of something else too, it is none. A bias belongs to its matrix if it is among
    ``given`` as well and shared in the same way.

    Args:
        model: Model whose modules are searched.
        given: Parameters that may be preconditioned; a set or a dictionary.
        taken: Parameters that are accounted for already; likewise.
        optional: Types of :data:`singd.layers.OPTIONAL` that are read as well.
    """
    owners: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is not None:
                owners.setdefault(p, []).append((module, key))
    found: dict[tuple[Tensor, str], WeightMatrix] = {}
    for name, module in model.named_modules():
        for layer in find_products(module, optional):
            weight, bias = (module._parameters.get(key) for key in (layer.weight, layer.bias))
            label = getattr(layer, "name", "") if layer.rows(module) is not None else ""
            if weight is None or weight not in given or weight in taken or (weight, label) in found:
                continue
            shared = owners[weight]
            if not weight.is_floating_point() or any(
                layer not in find_products(owner, optional) or key != layer.weight
                for owner, key in shared
            ):
                continue
            alike = [(owner, layer.bias) for owner, _ in shared]
            if bias is not None and (
                not layer.joins_bias or bias not in given or owners[bias] != alike
            ):
                bias = None
            found[weight, label] = WeightMatrix(
                name=f"{name}.{layer.weight}" if name else layer.weight,
                modules=tuple(owner for owner, _ in shared),
                layer=layer,
                weight=weight,
                bias=bias,
                rows=layer.rows(module),
                label=label,
            )
    return list(found.values())


def find_tensors(
    model: nn.Module, given: Collection[Tensor], taken: Collection[Tensor]
) -> list[WeightMatrix]:
    """Parameters of two or more dimensions as they are, among ``given`` and not ``taken``.

    Arguments are those of :func:`find_weight_matrices`.
    """
    return [
        WeightMatrix(name, (module,), ParameterTensor(key), p, None)
        for name, p, module, key in owners_of(model)
        if p in given and p not in taken and p.ndim >= 2 and p.numel() and p.is_floating_point()
    ]


def owners_of(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module, str]]:
    """Every parameter once: its name, itself, the module that holds it, and its name there."""
    met: set[Tensor] = set()
    for prefix, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None and p not in met:
                met.add(p)
                yield (f"{prefix}.{name}" if prefix else name), p, module, name
