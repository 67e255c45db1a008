"""Whether ``loss_average`` fits the loss: seen where softmax cross-entropy acts on an output.

Its gradient there is ``(softmax(z) - onehot) / M`` for a mean over ``M`` terms, which gives ``M``.
Other losses are not recognised, and nothing is said of them.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from singd._layer import Layer
from singd.layers import find_layer

_ROWS = 64


class LossCheck:
    """Hooks that look at the first step of training, and are removed with it."""

    def __init__(self, model: nn.Module) -> None:
        self.handles: list[Any] = []
        self.seen = False
        self.found: dict[int, list[tuple[float, int, int]]] = {}  # terms, samples, rows
        for module in model.modules():
            layer = find_layer(module)
            if (
                layer is not None
                and layer.joins_bias
                and not isinstance(module, nn.MultiheadAttention)
            ):
                self.handles.append(module.register_forward_hook(_OutputHook(self, layer)))

    def close(self) -> None:
        """Remove every hook."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.found.clear()

    def note(self, key: int, z: Tensor, g: Tensor, samples: int, rows: int) -> None:
        """Take in some rows of an output and of its gradient."""
        self.seen = True
        terms = cross_entropy_terms(z, g)
        if terms is not None and self.handles:
            self.found.setdefault(key, []).append((terms, samples, rows))

    def report(self, loss_averages: set[str | None], scale: Tensor | None) -> None:
        """Warn if what was seen contradicts the setting, and look no more.

        Args:
            loss_averages: Of all groups; nothing is said where they differ.
            scale: Of the loss, by a GradScaler.
        """
        for passes in list(self.found.values()):
            terms = sorted(t for t, _, _ in passes)[len(passes) // 2]
            terms *= 1.0 if scale is None else float(scale)
            samples, rows = sum(n for _, n, _ in passes), sum(r for _, _, r in passes)
            for setting in loss_averages if len(loss_averages) == 1 else ():
                better = contradiction(setting, terms, samples, rows)
                if better is not None:
                    counted = {None: 1, "batch": samples, "batch+sequence": rows}[setting]
                    warnings.warn(
                        f"the cross-entropy is a mean over about {terms:.0f} terms, but "
                        f"loss_average={setting!r} counts {counted}: set loss_average={better!r}, "
                        "or give the number with count_terms",
                        stacklevel=7,  # whoever calls the optimizer's step
                    )
                    self.close()
                    return
        if self.seen:
            self.close()


class _OutputHook:
    """Looks at the gradient of an output. Copied or pickled, it becomes an idle one."""

    def __init__(self, check: LossCheck | None = None, layer: Layer | None = None) -> None:
        self.check, self.layer = check, layer

    def __reduce__(self) -> tuple[Any, ...]:
        return _OutputHook, ()

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        check, layer = self.check, self.layer
        if check is None or layer is None or not check.handles:
            return
        if not isinstance(output, Tensor) or not output.requires_grad:
            return
        if torch._C._are_functorch_transforms_active():
            return

        def some(t: Tensor) -> tuple[Tensor, int, int]:
            """A few rows ``[rows, classes]``, spread evenly; samples; rows."""
            values = layer.grads(module, t.detach())
            if values.ndim > 3:  # in groups
                return values.new_zeros(0, 0), 0, 0
            rows = values.flatten(0, 1)
            return rows[:: len(rows) // _ROWS + 1].clone(), len(values), len(rows)

        z, samples, rows = some(output)
        output.register_hook(lambda g: check.note(id(module), z, some(g)[0], samples, rows))


@torch.no_grad()
def cross_entropy_terms(z: Tensor, g: Tensor) -> float | None:
    """The number of terms of a mean softmax cross-entropy; ``None`` if it is no such loss.

    Args:
        z: Logits, ``[rows, classes]``.
        g: Gradient of the loss with respect to them. Rows of zeros are left out.
    """
    used = (g != 0).any(-1)
    z, g = z[used].double(), g[used].double()
    if len(g) < 4 or z.shape[-1] < 2:
        return None
    d = z.softmax(-1) - F.one_hot(g.argmin(-1), z.shape[-1])
    size = (d * d).sum(-1)
    terms = (size / (d * g).sum(-1)).median()
    error = (terms * g - d).square().sum(-1) - 0.05**2 * size
    worst, terms_ = torch.stack([error.max(), terms]).tolist()
    return terms_ if worst <= 0 and 0 < terms_ < float("inf") else None


def contradiction(setting: str | None, terms: float, samples: int, rows: int) -> str | None:
    """The ``loss_average`` that fits a mean over ``terms`` where ``setting`` plainly does not."""

    def near(count: int) -> bool:
        return abs(terms - count) <= 0.05 * count

    if setting is None:
        means = terms >= 1.9 and (near(samples) or near(rows))
        return ("batch" if near(samples) else "batch+sequence") if means else None
    if rows < 2 * samples:
        return None
    if setting == "batch":
        return "batch+sequence" if 1.9 * samples <= terms <= 1.05 * rows else None
    return "batch" if near(samples) else None
