"""One step of a Kronecker-factored optimizer, as an object: it happens whole or not at all."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from singd import distributed
from singd.capture import Statistics, Unit
from singd.descent import descend
from singd.factors import Proposal, propose
from singd.grafting import graft_
from singd.grouping import Columns, Members, Products
from singd.options import Group, fused, peak_lr
from singd.rounding import Rounding
from singd.update import inner, precondition_apart, trust_region
from singd.verdict import reading_waits, write_

if TYPE_CHECKING:
    from singd.base import KroneckerOptimizer

Naturals = list[tuple[Columns, Tensor]]


class Step:
    """What happens between two passes: statistics to factors, gradients to parameters.

    Args:
        optimizer: Whose step it is.
        scale: Of the loss, by a GradScaler that has freed the gradients of it; ``None`` for none.
    """

    def __init__(self, optimizer: KroneckerOptimizer, scale: Tensor | None = None) -> None:
        self.optimizer, self.scale = optimizer, scale
        self.foreign = [fused(group) for group in self._foreign()]
        self.buckets = optimizer._buckets
        self.moments: list[tuple[Tensor, dict[str, Tensor]]] = []  # of grafting, if it is taken
        self.bounds: dict[int, Tensor] = {}  # of a group's step, by its id: what scales it
        self.report: dict[str, Any] | None = None if optimizer.telemetry is None else {}
        self.ok: Tensor | None = None  # guards what is written, if the host does not know

    def run(self, *, descend: bool = True) -> str | None:
        """Take the step, or nothing of it.

        Args:
            descend: Move the parameters; else put the preconditioned gradients into ``.grad``.

        Returns:
            The name of what was not finite, if anything: then nothing was changed. ``None`` too if
            the host does not know yet: then ``self.ok`` guards all changes on the device.
        """
        group = self.optimizer._process_group
        if distributed.size(group) > 1:
            for unit in self._due():
                for side in "KC":
                    unit.forms.setdefault(side, self.optimizer._form(unit, side))
                unit.statistics = {
                    part: unit.statistics.get(part) or self._nothing(unit, part)
                    for part in range(unit.layer.parts)
                }
                distributed.reduce_statistics(unit.statistics.values(), group)
            if self.optimizer._reduce_gradients:
                distributed.reduce_gradients(self._gradients(), group)
        proposals = propose(self.optimizer, self.buckets, self.scale, self.report)
        naturals, quadratic = self._naturals(proposals)
        if self.optimizer.max_skipped is not None:
            bad = self._nonfinite(proposals, naturals, quadratic)
            if bad is not None:
                return bad
        for proposal in proposals:
            ok = self.ok if proposal.updated else None
            proposal.bucket.store(proposal.members, proposal.products, ok)
        for p, moments in self.moments:
            state = self.optimizer.state[p]
            for name, moment in moments.items():
                kept = state[name] if name in state else torch.zeros_like(moment)
                state[name] = write_(kept.to(moment.device), moment, self.ok)
        if descend:
            self._descend(naturals)
            if self.foreign:
                self._train_others()
        else:
            for p, direction in _moves(naturals):
                if p.grad is not None:
                    nu = self.bounds.get(id(self.optimizer._groups[id(p)]))
                    direction = direction if nu is None else direction * nu.to(direction)
                    write_(p.grad, direction, self.ok)
        return None

    # What there is to do ------------------------------------------------------------------------

    def _due(self) -> list[Unit]:
        """The units whose factors are updated."""
        return [u for b in self.buckets for u in b.units if self.optimizer._due(u)]

    def _nothing(self, unit: Unit, part: int) -> Statistics:
        """Statistics of no rows, for a rank that did not use the unit."""
        like = [unit.member(side, part) for side in self.optimizer._sides]
        U_K, U_C = (m.to(torch.promote_types(m.dtype, torch.float32)).zeros_like() for m in like)
        return Statistics(U_K, U_C, 0, 0, 0)

    def _gradients(self) -> list[tuple[Tensor, Tensor]]:
        """Every parameter that has a gradient, with it."""
        every = (p for group in self.optimizer.param_groups for p in group["params"])
        return [(p, p.grad) for p in every if p.grad is not None]

    def _nonfinite(
        self, proposals: Sequence[Proposal], naturals: Naturals, quadratic: Tensor | None
    ) -> str | None:
        """The name of what is not finite, if anything; waits for the device once, or not at all.

        What is not finite in gradients or statistics shows in what is made of them, so only that is
        looked at; where it is not finite, the cause is searched for. If that can be left for later,
        ``self.ok`` will say whether all is finite.
        """
        made = [t for p in proposals if p.updated for m in p.members.values() for t in m.tensors()]
        made += [p.grad for g in self.foreign for p in g["params"] if p.grad is not None]
        made += [natural for _, natural in naturals] if quadratic is None else [quadratic]
        made = [t for t in made if t.numel()]
        if not made:
            return None
        if self._may_be_late():  # without a second look, where no more than a norm overflows
            self.ok = _all_finite(made, torch.inf)
            return None
        return None if bool(_all_finite(made, 2.0)) else self._cause(proposals, naturals)

    def _may_be_late(self) -> bool:
        """Whether the host may learn at the next step that this one was skipped.

        Not if the one before was, since an error may be due then, and not if nothing on the device
        can keep AdamW from moving.
        """
        optimizer = self.optimizer
        if optimizer.telemetry is not None or torch.compiler.is_compiling():
            return False
        if optimizer._verdict.in_row or optimizer.max_skipped == 1:
            return False
        return all(g["fused"] for g in self.foreign) and reading_waits(optimizer.param_groups)

    def _cause(self, proposals: Sequence[Proposal], naturals: Naturals) -> str | None:
        """The first parameter whose gradient, statistics, factors or direction are not finite."""
        names = {id(p): name for name, p in self.optimizer.model.named_parameters()}
        for p, gradient in self._gradients():
            if not bool(gradient.isfinite().all()):
                return names.get(id(p), "a parameter")
        for unit in self._due():
            for seen in unit.statistics.values():
                sums = (*seen.U_K.tensors(), *seen.U_C.tensors())
                if not all(bool(t.isfinite().all()) for t in sums):
                    return unit.name
        for proposal in proposals:
            for member in proposal.members.values():
                for t in member.tensors():
                    finite = t.isfinite().flatten(1).all(1).tolist()
                    if not all(finite):
                        return proposal.bucket.units[finite.index(False)].name
        for of, natural in naturals:
            finite = natural.isfinite().flatten(1).all(1).tolist()
            if not all(finite):
                return of.units[finite.index(False)].name
        return None

    def _foreign(self) -> list[Group]:
        """AdamW groups: those of its own, and the units whose gradient was not explained."""
        optimizer = self.optimizer
        groups = [g for g in optimizer.param_groups if g["rule"] == "adamw"]
        foreign = [unit for unit in optimizer._units if optimizer._is_foreign(unit)]
        self._hand_over([unit for unit in foreign if not optimizer._is_adamw(unit.weight)])
        for unit in foreign:
            group, options = unit.group, dict(optimizer._adamw.defaults)
            options["lr"] *= group["lr"] / (group.get("initial_lr", group["lr"]) or 1.0)
            groups.append({**options, "params": unit.parameters})
        return groups

    def _hand_over(self, units: Sequence[Unit]) -> None:
        """Leave units to AdamW that were found out just now."""
        for unit in units:
            for p in unit.parameters:
                self.optimizer.state.pop(p, None)
            unit.members.clear()
            self.optimizer._bucket_list = None
        if units:
            names = ", ".join(unit.name for unit in units)
            warnings.warn(
                f"{names}: what the layer is called with does not explain the gradient (is the "
                "weight used in another way too?); AdamW trains it instead",
                stacklevel=8,  # whoever calls the optimizer's step, which PyTorch wraps twice
            )

    # Parameters ---------------------------------------------------------------------------------

    def _naturals(self, proposals: Sequence[Proposal]) -> tuple[Naturals, Tensor | None]:
        """Preconditioned gradients of all units that have any, and the bounds of their steps.

        Also returns the sum that the bounds go by, if it saw all of them.
        """
        naturals: Naturals = []
        quadratic: dict[int, list[Tensor]] = {}  # of every group
        for proposal in proposals:
            units = [
                u for u in proposal.bucket.units if any(p.grad is not None for p in u.parameters)
            ]
            if not units:
                continue
            members, products = proposal.bucket.select(units, proposal.members, proposal.products)
            group = units[0].group
            for of, natural, G in self._preconditioned(units, members, products):
                if group["graft"] is not None:
                    self.moments += graft_(natural, G, units, self.optimizer)
                naturals.append((of, natural))
                if group["kl_clip"] is not None:
                    quadratic.setdefault(id(group), []).append(inner(natural, G))
                if self.report is not None:
                    for unit, N, g in zip(units, natural, G, strict=True):
                        own = self.report.setdefault(unit.name, {})
                        for name, norm in (("gradient_norm", g.norm()), ("natural_norm", N.norm())):
                            own[name] = norm if name not in own else torch.hypot(own[name], norm)
        if not quadratic:
            return naturals, None
        seen = sum(map(len, quadratic.values())) == len(naturals)
        groups = {id(of.units[0].group): of.units[0].group for of, _ in naturals}
        bounded = [group for group in groups.values() if group["kl_clip"] is not None]
        sums = [peak_lr(g) ** 2 * _sum(quadratic[id(g)]) for g in bounded]
        total = _sum(sums)
        for group in bounded:
            self.bounds[id(group)] = nu = trust_region(group["kl_clip"], total)
            if self.report is not None:
                self.report["trust_region"] = nu
        return naturals, total if seen else None

    def _preconditioned(
        self, units: Sequence[Unit], members: Members, products: Products
    ) -> list[tuple[Columns, Tensor, Tensor]]:
        """Preconditioned and plain gradients of equal units; of weights and biases apart if can be.

        That spares copies of both, side by side and back.
        """
        first, optimizer, pair = units[0], self.optimizer, None
        if first.bias is not None and first.group["graft"] is None:
            pair = optimizer._pair(members, products)
        apart = pair is not None and pair[0].dtype == first.weight.dtype
        if pair is None or not (apart and pair[0].rows_apart):
            both = Columns(units)
            G = both.gradients()
            return [(both, optimizer._precondition(members, products, G), G)]
        weights, biases = Columns(units, biases=False), Columns(units, weights=False)
        G, g = weights.gradients(), biases.gradients()
        of_weights, of_biases = precondition_apart(*pair, G, g)
        return [(weights, of_weights, G), (biases, of_biases, g)]

    def _descend(self, naturals: Naturals) -> None:
        """Move every parameter of the units along its preconditioned gradient."""
        groups = self.optimizer._groups
        moves: dict[tuple[Any, ...], list[tuple[nn.Parameter, Tensor]]] = {}
        for p, direction in _moves(naturals):
            moves.setdefault((id(groups[id(p)]), p.device, p.dtype), []).append((p, direction))
        roundings: dict[int, Rounding] = {}
        for there in moves.values():
            params, directions = [p for p, _ in there], [direction for _, direction in there]
            group = groups[id(params[0])]
            fresh = Rounding(group["seed"], group["step"], stream=-1)
            descend(
                params,
                directions,
                [self._momentum_buffer(p) for p in params] if group["momentum"] else [],
                lr=group["lr"],
                momentum=group["momentum"],
                weight_decay=group["weight_decay"],
                rounding=roundings.setdefault(id(group), fresh),
                scale=self.bounds.get(id(group)),
                ok=self.ok,
            )

    def _train_others(self) -> None:
        """AdamW's step, which takes what guards it in the way of a GradScaler."""
        adamw: Any = self.optimizer._adamw
        adamw.param_groups, adamw.state = self.foreign, self.optimizer.state
        if self.ok is not None:
            adamw.found_inf = (~self.ok).float()
        try:
            adamw.step()
        finally:
            vars(adamw).pop("found_inf", None)

    def _momentum_buffer(self, p: Tensor) -> Tensor:
        state = self.optimizer.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def _moves(naturals: Naturals) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Every parameter of the units that has a gradient with its direction."""
    for of, natural in naturals:
        yield from of.moves(natural)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """The sum of all numbers in some tensors, on the device of the first."""
    if len(parts) == 1:
        return parts[0].sum() if parts[0].ndim else parts[0]
    return torch.cat([part.view(-1).to(parts[0].device) for part in parts]).sum()


def _all_finite(tensors: list[Tensor], ord: float) -> Tensor:
    """Whether no entry is infinite or NaN, on their device, by their norms of order ``ord``.

    That of order 2, which is the fast one on the CPU, may itself overflow; that of infinity cannot.
    """
    norms = torch._foreach_norm(tensors, ord)
    return torch.stack([n.to(norms[0].device) for n in norms]).isfinite().all()
