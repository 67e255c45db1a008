"""The weights of a model as matrices, out of and into its parameters, and their derivatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from singd.capture.weight_matrix import WeightMatrix
from singd.factors.curvature import evaluated
from singd.factors.records import KroneckerFactors

Values = Mapping[str, Tensor]
"""Parameters of a model by name, as :func:`torch.func.functional_call` takes them."""

Function = Callable[..., Tensor]
"""``function(model, *sample)``: numbers ``[...]`` for one sample."""


class Weights:
    """The matrices ``[..., d_out, d_in]`` of a model that factors are of, by their names.

    Args:
        factors: Factors of the weights.
        model: Model that has them.

    Raises:
        ValueError: If the factors are not those of the model.
    """

    def __init__(self, factors: KroneckerFactors, model: nn.Module) -> None:
        self.model, self.matrices = model, factors.bind(model)
        self._names = {p: name for name, p in model.named_parameters()}

    def values(self) -> dict[str, Tensor]:
        """The present values of all parameters, detached."""
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def of(self, values: Values) -> dict[str, Tensor]:
        """The matrices in values of the parameters, with their biases."""
        return {key: self._read(matrix, values) for key, matrix in self.matrices.items()}

    def _read(self, matrix: WeightMatrix, values: Values) -> Tensor:
        weight, *bias = (matrix.part(values[self._names[p]]) for p in matrix.parameters)
        parts = [matrix.to_matrix(weight), *(b.reshape(*matrix.shape[:-1], 1) for b in bias)]
        return torch.cat(parts, -1)

    def into(self, matrices: Mapping[str, Tensor], values: Values) -> dict[str, Tensor]:
        """Copies of the values with other matrices in them."""
        new = dict(values)
        for key, X in matrices.items():
            matrix = self.matrices[key]
            for p, part in zip(matrix.parameters, matrix.split(X), strict=True):
                name = self._names[p]
                new[name] = new[name].clone()
                matrix.part(new[name]).copy_(part)
        return new

    def jacobians(
        self, function: Function, *samples: Tensor, chunk: int | None = None
    ) -> dict[str, Tensor]:
        """Derivatives ``[N, ..., *shape]`` of ``function`` of each sample by each matrix.

        Args:
            function: Function of the model and one sample, with a batch dimension of one.
            samples: Tensors ``[N, ...]``.
            chunk: Number of samples at a time; all if ``None``.
        """
        values = self.values()
        names = {self._names[p] for matrix in self.matrices.values() for p in matrix.parameters}
        ours = {name: values[name] for name in names}

        def call(ours: dict[str, Tensor], *sample: Tensor) -> Tensor:
            def model(*args: Tensor) -> Tensor:
                return torch.func.functional_call(self.model, {**values, **ours}, args)

            return function(model, *(t[None] for t in sample))

        def one(*sample: Tensor) -> dict[str, Tensor]:
            J: dict[str, Tensor] = torch.func.jacrev(call)(ours, *sample)
            name = next(iter(J))
            read = self.of
            for _ in range(J[name].ndim - ours[name].ndim):
                read = torch.vmap(read)
            return read(J)

        # Not loaded with torch. The other kernels of attention cannot be mapped over samples.
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with evaluated(self.model), sdpa_kernel(SDPBackend.MATH):
            found: dict[str, Tensor] = torch.vmap(one, chunk_size=chunk)(*samples)
        return {key: J.detach() for key, J in found.items()}


def outputs(model: Callable[..., Tensor], x: Tensor) -> Tensor:
    """The outputs ``[k]`` of one sample."""
    return model(x)[0]


def columns(J: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``J [..., *shape]`` as columns ``[*batch, d_out d_in, m]``, each a matrix by rows in turn."""
    *batch, d_out, d_in = shape
    return J.reshape(-1, *batch, d_out * d_in).movedim(0, -1)
