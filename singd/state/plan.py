"""The plan: which rule trains each parameter, and what it stores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from singd.capture.weight_matrix import WeightMatrix, owners_of
from singd.methods.flops import Flops, flops_of
from singd.methods.options import graft_of
from singd.ops.dtensor import is_distributed, local
from singd.step import grafting
from singd.step.pipeline import Parts


@dataclass(frozen=True)
class Row:
    """One parameter of the plan."""

    parameter: str
    shape: tuple[int, ...]
    layer: str
    rule: str
    structures: str
    state_bytes: int
    place: str = ""
    sent_bytes: float = 0.0
    nats_lost: float | None = None  # by structures that were chosen from the curvature
    flops: float = 0.0  # of a step's updates and directions; nan where they cannot be counted


@dataclass(frozen=True)
class Plan:
    """What an optimizer does with every parameter of a model; prints as a table.

    Of a sharded model it is what this rank stores and sends.
    """

    rows: tuple[Row, ...]
    adamw_bytes: int  # what AdamW would store for the same parameters

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state, once every parameter has been stepped."""
        return sum(row.state_bytes for row in self.rows)

    @property
    def sent_bytes(self) -> float:
        """Bytes that this rank sends in a step, on average, for statistics, factors and directions.

        Steps of a burn-in, each of which updates the factors, send more. What any optimizer needs,
        such as what FSDP2 itself sends, is not counted.
        """
        return sum(row.sent_bytes for row in self.rows)

    @property
    def flops(self) -> float:
        """Floating-point operations in a step for factors and directions, on average.

        Steps of a burn-in take more. Operations of statistics, which grow with the batch, and of
        the moves of weights are not counted.
        """
        return sum(row.flops for row in self.rows)

    def __str__(self) -> str:
        head = ["parameter", "shape", "layer", "rule", "structures", "state bytes", "flops a step"]
        body: list[tuple[str, ...]] = [
            (
                *(r.parameter, _times(r.shape), r.layer, r.rule, r.structures),
                *(f"{r.state_bytes:,}", f"{r.flops:,.0f}" if r.flops else ""),
            )
            for r in self.rows
        ]
        if any(r.place for r in self.rows):
            head += ["place", "bytes sent a step"]
            sent = [f"{r.sent_bytes:,.0f}" if r.place else "" for r in self.rows]
            body = [(*b, r.place, n) for b, r, n in zip(body, self.rows, sent, strict=True)]
        if any(r.nats_lost is not None for r in self.rows):
            head.append("nats lost")
            lost = ["" if r.nats_lost is None else f"{r.nats_lost:.4g}" for r in self.rows]
            body = [(*b, n) for b, n in zip(body, lost, strict=True)]
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (head, *body)]
        ratio = self.state_bytes / self.adamw_bytes if self.adamw_bytes else float("nan")
        total = [
            f"state: {self.state_bytes:,} bytes, {ratio:.2f} of AdamW's {self.adamw_bytes:,}",
            f"factors and directions: {self.flops:,.0f} flops a step",
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *total])


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "1"


def make_plan(rule: str, parts: Parts) -> Plan:
    """The plan of an optimizer whose rule has this name; nothing is allocated."""
    parameters, store, fallback = parts.parameters, parts.store, parts.fallback
    ours: dict[Tensor, list[WeightMatrix]] = {}
    for matrix in parameters.preconditioned():
        for p in matrix.parameters:
            ours.setdefault(p, []).append(matrix)
    counter = nbytes(torch.tensor(0.0))
    rows, adamw = [], 0
    counted: dict[Any, Flops] = {}
    for name, p, module, _ in owners_of(parameters.model):
        kind, structures, stored, place, sent, work = "frozen", "", 0, "", 0.0, 0.0
        lost: float | None = None
        if p in parameters.group_of:
            group = parameters.group_of[p]
            of_adamw = len(fallback.state_names()) * nbytes(p) + counter
            adamw += of_adamw
            if p not in ours:
                kind, stored = "AdamW", of_adamw
            else:
                kind = rule
                stored = nbytes(p) if group["momentum"] else 0
                if any(parameters.group_of[m.weight]["graft"] == "adamw" for m in ours[p]):
                    stored += len(grafting.ADAMW_NAMES) * nbytes(p) + counter
                if graft_of(group) == "running":
                    own_weight = sum(matrix.weight is p for matrix in ours[p])
                    stored += own_weight * nbytes(grafting.no_norms(p))
                for matrix in ours[p]:
                    own = parameters.group_of[matrix.weight]
                    structures = ", ".join(map(str, store.structures(matrix, own)))
                    if own.get("structures") == "auto":
                        structures = f"auto, averages: {structures}"
                    lost = own.get("nats_lost", {}).get(matrix.name) if p is matrix.weight else None
                    is_shared = is_distributed(p) or parts.placement.has_others
                    if p is matrix.weight and is_shared:
                        place = _place(parts, matrix)
                        sent += parts.placement.traffic(matrix)
                    if p is matrix.weight and parts.placement.holds(matrix):
                        factors = store.fresh(matrix, own, None, "meta")
                        stored += nbytes(store.encoded(factors, own, None).tensors)
                        key = matrix.shape, store.structures(matrix, own), p.dtype, id(own)
                        if key not in counted:
                            counted[key] = flops_of(store.method, key[0], key[1], own, p.dtype)
                        work += counted[key].in_step(_share(parts, matrix))
        elif p.requires_grad:
            kind = "not given"
        layer = type(module).__name__
        shape = tuple(p.shape)
        rows.append(Row(name, shape, layer, kind, structures, stored, place, sent, lost, work))
    return Plan(tuple(rows), adamw)


def _place(parts: Parts, matrix: WeightMatrix) -> str:
    owner = parts.placement.owner_of(matrix)
    return parts.placement.place_of(matrix) + ("" if owner is None else f" by {owner}")


def _share(parts: Parts, matrix: WeightMatrix) -> float:
    """How much of a direction this rank makes: where work is divided, as much as it holds."""
    if parts.placement.place_of(matrix) not in ("rows", "columns"):
        return 1.0
    held, whole = (
        sum(p.numel() for p in ps) for ps in (map(local, matrix.parameters), matrix.parameters)
    )
    return held / max(whole, 1)


def nbytes(value: Any) -> int:
    """Bytes on this rank of a tensor, or of all in a container."""
    if isinstance(value, Tensor):
        return local(value).numel() * value.element_size()
    return sum(nbytes(v) for v in (value.values() if isinstance(value, dict) else value))
