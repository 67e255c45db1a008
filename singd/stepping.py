"""One step of a Kronecker-factored optimizer, as an object: it happens whole or not at all."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from singd import distributed
from singd.capture import Statistics, Unit
from singd.grouping import Bucket, gather, stack
from singd.options import Group, peak_lr
from singd.rounding import Rounding
from singd.update import inner, residual, trust_region

if TYPE_CHECKING:
    from singd.base import KroneckerOptimizer

Naturals = list[tuple[list[Unit], Tensor]]


class Step:
    """What happens between two passes: statistics to factors, gradients to parameters.

    Args:
        optimizer: Whose step it is.
        scale: Of the loss, by a GradScaler; ``None`` for none.
        unscaled: Whether the gradients are free of ``scale`` already.
    """

    def __init__(
        self, optimizer: KroneckerOptimizer, scale: Tensor | None = None, *, unscaled: bool = False
    ) -> None:
        self.optimizer, self.scale, self.unscaled = optimizer, scale, unscaled
        self.foreign = self._foreign()
        self.buckets = optimizer._buckets
        self.report: dict[str, Any] | None = None if optimizer.telemetry is None else {}

    def run(self, *, descend: bool = True) -> str | None:
        """Take the step, or nothing of it.

        Args:
            descend: Move the parameters; else put the preconditioned gradients into ``.grad``.

        Returns:
            The name of what was not finite, if anything: then nothing was changed.
        """
        group = self.optimizer._process_group
        if distributed.size(group) > 1:
            everywhere = [unit.statistics or self._nothing(unit) for unit in self._due()]
            distributed.reduce_statistics(everywhere, group)
            for unit, seen in zip(self._due(), everywhere, strict=True):
                unit.statistics = seen
            if self.optimizer._reduce_gradients:
                distributed.reduce_gradients(self._gradients(), group)
        if self.optimizer.max_skipped is not None and (bad := self._nonfinite()) is not None:
            return bad
        if self.scale is not None and not self.unscaled:
            torch._foreach_mul_([g for _, g in self._gradients()], 1.0 / self.scale)
        for index, bucket in enumerate(self.buckets):
            self._update(bucket, stream=index)
        naturals = self._naturals()
        if descend:
            self._descend(naturals)
            if self.foreign:
                adamw = self.optimizer._adamw
                adamw.param_groups, adamw.state = self.foreign, self.optimizer.state
                adamw.step()
        else:
            for p, direction in _moves(naturals):
                if p.grad is not None:
                    p.grad.copy_(direction)
        return None

    # What there is to do ------------------------------------------------------------------------

    def _due(self) -> list[Unit]:
        """The units whose factors are updated."""
        return [u for b in self.buckets for u in b.units if self.optimizer._due(u)]

    def _nothing(self, unit: Unit) -> Statistics:
        """Statistics of no rows, for a rank that did not use the unit."""
        like = [unit.members[side] for side in self.optimizer._sides]
        U_K, U_C = (m.to(torch.promote_types(m.dtype, torch.float32)).zeros_like() for m in like)
        return Statistics(U_K, U_C, 0, 0, 0)

    def _gradients(self) -> list[tuple[Tensor, Tensor]]:
        """Every parameter that has a gradient, with it."""
        every = (p for group in self.optimizer.param_groups for p in group["params"])
        return [(p, p.grad) for p in every if p.grad is not None]

    def _nonfinite(self) -> str | None:
        """The first parameter whose gradient or statistics are not finite."""
        names = {id(p): name for name, p in self.optimizer.model.named_parameters()}
        found = [(names.get(id(p), "a parameter"), g) for p, g in self._gradients()]
        for unit in self._due():
            if unit.statistics is not None:
                parts = (unit.statistics.U_K, unit.statistics.U_C)
                found += [(unit.name, t) for part in parts for t in part.tensors()]
        found = [(name, t) for name, t in found if t.numel()]
        if not found:
            return None
        norms = torch._foreach_norm([t for _, t in found], float("inf"))
        finite = torch.stack([n.float().to(norms[0].device) for n in norms]).isfinite()
        if bool(finite.all()):
            return None
        return next(
            name for (name, _), good in zip(found, finite.tolist(), strict=True) if not good
        )

    def _foreign(self) -> list[Group]:
        """AdamW groups: those of its own, and the units whose gradient was not explained."""
        optimizer = self.optimizer
        groups = [g for g in optimizer.param_groups if g["rule"] == "adamw"]
        for unit in optimizer._units:
            if not optimizer._is_foreign(unit):
                continue
            if not optimizer._is_adamw(unit.weight):  # found out just now
                warnings.warn(
                    f"{unit.name}: its layer's inputs and outputs do not explain its gradient (is "
                    "the weight used in another way too?); AdamW trains it instead",
                    stacklevel=5,
                )
                for p in unit.parameters:
                    optimizer.state.pop(p, None)
                unit.members.clear()
                optimizer._bucket_list = None
            group, options = unit.group, dict(optimizer._adamw.defaults)
            options["lr"] *= group["lr"] / (group.get("initial_lr", group["lr"]) or 1.0)
            groups.append({**options, "params": unit.parameters})
        return groups

    # Factors ------------------------------------------------------------------------------------

    def _update(self, bucket: Bucket, stream: int) -> None:
        """Normalise the statistics of a bucket, once, and update its factors."""
        optimizer, group = self.optimizer, bucket.units[0].group
        units = [u for u in bucket.units if u.statistics is not None and u.statistics.rows]
        if units and optimizer._due(units[0]):
            seen = [(u.statistics, u) for u in units if u.statistics is not None]
            U_K = stack([(1.0 / s.rows) * s.U_K for s, _ in seen])
            U_C = stack([self._terms(s, u) * s.U_C for s, u in seen])
            old, _ = bucket.select(units)
            if self.report is not None and "K" in old:
                for side, U in (("K", U_K), ("C", U_C)):
                    norms = residual(old[side].to(U.dtype), U, group["damping"])
                    for unit, norm in zip(units, norms, strict=True):
                        self.report.setdefault(unit.name, {})[f"residual_{side}"] = norm
            rounding = Rounding(group["seed"], group["step"], stream)
            bucket.write(units, optimizer._update(group, old, U_K, U_C), rounding)
            bucket.products.clear()
        if not bucket.products:
            bucket.products = optimizer._products(group, bucket.members)

    def _terms(self, seen: Statistics, unit: Unit) -> float | Tensor:
        """What multiplies ``sum g g^T``: the terms of the loss, over the squared gradient scale."""
        terms = self.optimizer._terms
        if not isinstance(terms, Tensor) and not terms:
            counts = {None: 1, "batch": seen.samples, "batch+sequence": seen.terms}
            terms = counts[unit.group["loss_average"]]
        terms = terms / distributed.size(self.optimizer._process_group) ** 2
        return terms if self.scale is None else terms / self.scale.double().square()

    # Parameters ---------------------------------------------------------------------------------

    def _naturals(self) -> Naturals:
        """Preconditioned gradients of all units that have any, bounded together."""
        naturals: Naturals = []
        quadratic = []
        for bucket in self.buckets:
            units = [u for u in bucket.units if any(p.grad is not None for p in u.parameters)]
            if not units:
                continue
            G = gather(units)
            natural = self.optimizer._precondition(*bucket.select(units), G)
            naturals.append((units, natural))
            if units[0].group["kl_clip"] is not None:
                quadratic.append(peak_lr(units[0].group) ** 2 * inner(natural, G))
            if self.report is not None:
                for unit, N, g in zip(units, natural, G, strict=True):
                    norms = {"gradient_norm": g.norm(), "natural_norm": N.norm()}
                    self.report.setdefault(unit.name, {}).update(norms)
        if quadratic:
            total = torch.stack([q.to(quadratic[0].device) for q in quadratic]).sum()
            for units, natural in naturals:
                kl_clip = units[0].group["kl_clip"]
                if kl_clip is not None:
                    nu = trust_region(kl_clip, total)
                    natural.mul_(nu.to(natural))
                    if self.report is not None:
                        self.report["trust_region"] = nu
        return naturals

    def _descend(self, naturals: Naturals) -> None:
        """Move every parameter of the units along its preconditioned gradient."""
        moves: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for p, direction in _moves(naturals):
            if p.grad is not None:
                moves.setdefault(id(self.optimizer._groups[id(p)]), []).append((p, direction))
        for group in self.optimizer.param_groups:
            if id(group) in moves:
                self._descend_group(group, moves[id(group)])

    def _descend_group(self, group: Group, moves: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Weight decay, momentum and the step, for one group."""
        params = [p for p, _ in moves]
        directions = [d.to(p.dtype) for p, d in moves]
        if group["weight_decay"] != 0:
            torch._foreach_add_(directions, params, alpha=group["weight_decay"])
        if group["momentum"] != 0:
            buffers = []
            for p in params:
                state = self.optimizer.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffers.append(state["momentum_buffer"])
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, directions)
            directions = buffers
        if all(p.dtype in (torch.float32, torch.float64) for p in params):
            torch._foreach_add_(params, directions, alpha=-group["lr"])
            return
        rounding = Rounding(group["seed"], group["step"], stream=-1)
        for p, direction in zip(params, directions, strict=True):
            p.copy_(rounding(p.float() - group["lr"] * direction.float(), p.dtype))


def _moves(naturals: Naturals) -> Iterable[tuple[Tensor, Tensor]]:
    """Every parameter of the units with its direction."""
    for units, natural in naturals:
        for unit, matrix in zip(units, natural, strict=True):
            yield from zip(unit.parameters, unit.split(matrix), strict=True)
