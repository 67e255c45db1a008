"""Whether what the hooks see of a weight explains its gradient, by a few random probes.

Some passes are verified, the first one always. If what the hooks saw does not explain the gradient
(the weight is also used in another way), the weight must not be preconditioned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from singd.capture.statistics import read
from singd.capture.weight_matrix import WeightMatrix
from singd.ops.dtensor import local, whole
from singd.ops.parts import Part

_PROBES = 8
_NOISE = 100.0  # what rounding may do, in units in the last place


class Verification:
    """What is known about the use of a weight, after some passes.

    ``explained`` is ``True`` or ``False`` once that could be told, ``None`` before; ``reason`` says
    why a weight is not explained.
    """

    def __init__(self) -> None:
        self.explained: bool | None = None
        self.reason = ""
        self.passes = 0

    def refuse(self, reason: str) -> None:
        """The weight is used in a way that its layer does not describe."""
        if self.explained is not False:
            self.explained, self.reason = False, reason

    def is_due(self) -> bool:
        """Whether to verify the coming pass: 1, 2, 4, 8, ..., and until one could be told."""
        return self.explained is None or self.passes & (self.passes - 1) == 0

    def conclude(self, probes: Probes | None) -> None:
        """Take in a pass that has reached the weight."""
        self.passes += 1
        explained = None if probes is None else probes.explain()
        if explained is False:
            self.refuse(
                "what the layer is called with does not explain the gradient (is the weight used "
                "in another way too?)"
            )
        elif explained and self.explained is None:
            self.explained = True


class Probes:
    """``v^T G u`` of the gradient of a weight: before a pass, after it, and as the hooks see it.

    Args:
        matrix: Weight that is verified.
        weight: Parameter whose gradient it is.
        part: The inputs or output gradients that this rank sees, if not all; and of the gradient.
    """

    def __init__(
        self, matrix: WeightMatrix, weight: nn.Parameter, part: Part | None = None
    ) -> None:
        self.matrix, self.weight, self.is_part = matrix, weight, part is not None
        *_, d_out, d_in = matrix.layer.shape(matrix.module)
        self.u, self.v = (_directions(d, matrix.weight.device) for d in (d_in, d_out))
        if part is not None and part.side == "input":
            self.u = self.u[part.rows]
        elif part is not None:
            self.v = self.v[part.rows]
        self.before = self._of_gradient()
        self.sums = torch.zeros_like(self.before)
        self.scale = self.sums.new_zeros(())  # of what was summed

    def include(self, module: nn.Module, x: Tensor, g: Tensor) -> None:
        """Include one use of ``module`` with input ``x`` and output gradient ``g``.

        Raises:
            UnreadableError: If input and output do not fit together.
        """
        read(self.matrix.layer, self._include, module, x, g)

    def _include(self, module: nn.Module, x: Tensor, g: Tensor) -> None:
        layer = self.matrix.layer
        right = layer.inputs_along(module, x, self.u)
        left = layer.grads_along(module, g, self.v)
        if left.shape != right.shape:
            raise ValueError(f"inputs along {list(right.shape)}, gradients {list(left.shape)}")
        self.scale += torch.linalg.vector_norm(left) * torch.linalg.vector_norm(right) / _PROBES
        self.sums += (left * right).sum((-3, -2))

    def explain(self) -> bool | None:
        """Whether the two agree but for a positive factor (of a gradient scaler, of averaging).

        ``None`` where that cannot be told: no gradient but by rounding, or it is not finite.
        """
        gradient = (self._of_gradient() - self.before).flatten()
        sums = self.sums.flatten()
        weight = self.weight
        dtype = weight.dtype if weight.grad is None else weight.grad.dtype
        rounding = _NOISE * (
            torch.finfo(sums.dtype).eps * self.scale
            + torch.finfo(dtype).eps * torch.linalg.vector_norm(self.before)
        )
        norms = [torch.linalg.vector_norm(t) for t in (gradient, sums)]
        a, b, both, noise = torch.stack([*norms, gradient @ sums, rounding]).tolist()
        if not a + b < float("inf") or not a > noise:  # not if one is NaN either
            return None
        return bool(b > noise and both >= 0.99 * a * b)

    def _of_gradient(self) -> Tensor:
        """Of the gradient of the weight, ``[..., probes]``."""
        matrix = self.matrix
        grad: Any = self.weight.grad
        if grad is None:
            *batch, _, _ = matrix.layer.shape(matrix.module)
            return torch.zeros(*batch, _PROBES, device=matrix.weight.device)
        if self.is_part:
            weight: Any = self.weight
            G = local(grad.redistribute(placements=weight.placements))
        else:
            G = matrix.to_matrix(matrix.part(whole(grad)))
        return ((G.to(self.u) @ self.u) * self.v).sum(-2)


def _directions(n: int, device: torch.device) -> Tensor:
    """Random directions ``[n, probes]``, always the same."""
    return torch.randn(n, _PROBES, generator=torch.Generator().manual_seed(n)).to(device)
