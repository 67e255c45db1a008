"""Whether what the hooks see of a weight explains its gradient, by a few random probes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from singd._layer import Layer

_PROBES = 8
_NOISE = 100.0  # what rounding may do, in units in the last place


class Probes:
    """``v^T G u`` of the gradient of a weight: before a pass, after it, and as the hooks see it.

    Args:
        layer: How ``module`` is read.
        module: The module with the weight.
        weight: The weight.
    """

    def __init__(self, layer: Layer, module: nn.Module, weight: nn.Parameter) -> None:
        self.layer, self.module, self.weight = layer, module, weight
        *_, d_out, d_in = layer.shape(module)
        self.u, self.v = (_directions(d, weight.device) for d in (d_in, d_out))
        self.before = self._of_gradient()
        self.seen = torch.zeros_like(self.before)
        self.scale = self.seen.new_zeros(())  # of what was summed

    def see(self, module: nn.Module, part: int, x: Tensor, g: Tensor) -> None:
        """Include one use of ``module``."""
        into = self.seen[part] if self.layer.parts > 1 else self.seen
        right = self.layer.inputs_along(module, x, self.u)
        left = self.layer.grads_along(module, g, self.v)
        self.scale += torch.linalg.vector_norm(left) * torch.linalg.vector_norm(right) / _PROBES
        into += (left * right).sum((-3, -2))

    def explain(self) -> bool | None:
        """Whether the two agree but for a positive factor (of a gradient scaler, of averaging).

        ``None`` where that cannot be told: no gradient but by rounding, or it is not finite.
        """
        gradient = (self._of_gradient() - self.before).flatten()
        seen = self.seen.flatten()
        held = self.weight.dtype if self.weight.grad is None else self.weight.grad.dtype
        rounding = _NOISE * (
            torch.finfo(seen.dtype).eps * self.scale
            + torch.finfo(held).eps * torch.linalg.vector_norm(self.before)
        )
        norms = [torch.linalg.vector_norm(t) for t in (gradient, seen)]
        a, b, both, noise = torch.stack([*norms, gradient @ seen, rounding]).tolist()
        if not a + b < float("inf") or not a > noise:  # not if one is NaN either
            return None
        return bool(b > noise and both >= 0.99 * a * b)

    def _of_gradient(self) -> Tensor:
        """Of ``weight.grad``, ``[..., probes]``."""
        grad: Any = self.weight.grad
        if grad is None:
            *batch, _, _ = self.layer.shape(self.module)
            return torch.zeros(*batch, _PROBES, device=self.weight.device)
        return ((self.layer.to_matrix(self.module, grad).to(self.u) @ self.u) * self.v).sum(-2)


def _directions(n: int, device: torch.device) -> Tensor:
    """Random directions ``[n, probes]``, always the same."""
    return torch.randn(n, _PROBES, generator=torch.Generator().manual_seed(n)).to(device)
