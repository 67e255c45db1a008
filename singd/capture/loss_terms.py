"""How many terms a softmax cross-entropy is a mean over: seen in the gradient of its input.

That gradient is ``(softmax(z) - onehot) / M`` for a mean over ``M`` terms, which gives ``M``. Other
losses are not recognised, and nothing is said of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from singd.capture.hooks import is_batched, is_watching
from singd.capture.samples import Call, Calls, is_dense
from singd.capture.statistics import UnreadableError, read
from singd.capture.transient import Hook, attach_after
from singd.capture.warning import warn_user
from singd.layers import Layer, find_layer
from singd.ops.dtensor import is_distributed

_ROWS = 64


class LossTerms:
    """Hooks that look at the outputs of layers: at the first step, to check ``loss_average``.

    Where parts of a model are called one by one they look at every step, to find out N.
    """

    def __init__(self, model: nn.Module, calls: Calls) -> None:
        self.calls = calls
        self.is_checked = False
        self.handles: list[Any] = []
        self.found: dict[nn.Module, list[tuple[float, int, int]]] = {}  # terms, samples, rows
        self._looked = False
        for module in model.modules():
            layer = find_layer(module)
            if layer is None or not layer.joins_bias or isinstance(module, nn.MultiheadAttention):
                continue
            hook = _OutputHook(self, layer)
            self.handles.append(attach_after(module, hook, first=True))

    def close(self) -> None:
        """Remove every hook."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.found.clear()

    def note(
        self, module: nn.Module, call: Call, z: Tensor, g: Tensor, samples: int, rows: int
    ) -> None:
        """Take in some rows of an output and of its gradient."""
        self._looked = True
        terms = cross_entropy_terms(z, g)
        if terms is None:
            return
        if not call.sizes:
            call.loss_terms = round(terms)
        if not self.is_checked:
            self.found.setdefault(module, []).append((terms, samples, rows))

    def check(self, loss_averages: set[str | None], scale: Tensor | None) -> None:
        """Warn at the first step if what was found contradicts the setting.

        Args:
            loss_averages: Setting of every group; nothing is said where they differ.
            scale: Scale of the loss, by a GradScaler.
        """
        if self.is_checked or not self._looked:
            return
        self.is_checked = True
        for passes in list(self.found.values()) if len(loss_averages) == 1 else ():
            terms = sorted(t for t, _, _ in passes)[len(passes) // 2]
            terms *= 1.0 if scale is None else float(scale)
            samples, rows = sum(n for _, n, _ in passes), sum(r for _, _, r in passes)
            (setting,) = loss_averages
            better = contradiction(setting, terms, samples, rows)
            if better is not None:
                counted = {None: 1, "batch": samples, "batch+sequence": rows}[setting]
                warn_user(
                    f"the cross-entropy is a mean over about {terms:.0f} terms, but "
                    f"loss_average={setting!r} counts {counted}: set loss_average={better!r}, "
                    "or give the number with count_terms"
                )
                break
        self.found.clear()
        if self.calls.current.sizes:
            self.close()


class _OutputHook(Hook):
    """Looks at the gradient of an output that a layer reads."""

    def __init__(self, terms: LossTerms, layer: Layer) -> None:
        self.terms, self.layer = terms, layer
        self.eager = torch.compiler.disable(self._run)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if torch.is_grad_enabled() and not torch.compiler.is_exporting():
            self.eager(module, output)

    def _run(self, module: nn.Module, output: Any) -> None:
        terms, call = self.terms, self.terms.calls.current
        if not terms.handles or (terms.is_checked and call.sizes) or not is_watching():
            return
        if not is_dense(output) or not output.requires_grad:
            return
        if output.is_complex() or is_distributed(output):
            return
        z, samples, rows = self._some(module, output)

        def note(g: Tensor) -> None:
            if not is_batched(g):
                terms.note(module, call, z, self._some(module, g)[0], samples, rows)

        if rows:
            output.register_hook(note)

    def _some(self, module: nn.Module, t: Tensor) -> tuple[Tensor, int, int]:
        """A few rows ``[rows, classes]``, spread evenly; number of samples; number of rows."""
        try:
            values = read(self.layer, self.layer.grads, module, t.detach())
        except UnreadableError:
            return t.new_zeros(0, 0), 0, 0
        if values.ndim > 3:  # in groups
            return values.new_zeros(0, 0), 0, 0
        rows = values.flatten(0, 1)
        return rows[:: len(rows) // _ROWS + 1].clone(), len(values), len(rows)


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
