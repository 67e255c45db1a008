"""The plan: which rule trains each parameter, and what it stores."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from singd import grafting
from singd.capture import Unit
from singd.layers import find_products

if TYPE_CHECKING:
    from singd.base import KroneckerOptimizer


@dataclass(frozen=True)
class Row:
    """One parameter of the plan."""

    parameter: str
    shape: tuple[int, ...]
    layer: str
    rule: str
    structures: str
    state_bytes: int


@dataclass(frozen=True)
class Plan:
    """What an optimizer does with every parameter of a model; prints as a table."""

    rows: tuple[Row, ...]
    adamw_bytes: int  # what AdamW would store for the same parameters

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state, once every parameter has been stepped."""
        return sum(row.state_bytes for row in self.rows)

    def __str__(self) -> str:
        head = ("parameter", "shape", "layer", "rule", "structures", "state bytes")
        body = [
            (r.parameter, _times(r.shape), r.layer, r.rule, r.structures, f"{r.state_bytes:,}")
            for r in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (head, *body)]
        ratio = self.state_bytes / self.adamw_bytes if self.adamw_bytes else float("nan")
        total = f"state: {self.state_bytes:,} bytes, {ratio:.2f} of AdamW's {self.adamw_bytes:,}"
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], total])


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "1"


def make_plan(optimizer: KroneckerOptimizer) -> Plan:
    """The plan of an optimizer; nothing is allocated."""
    weights = {id(unit.weight): unit for unit in optimizer._units}
    units = {id(p): unit for unit in optimizer._units for p in unit.parameters}
    rows, adamw = [], 0
    for name, p, module, _ in owners_of(optimizer.model):
        rule, structures, stored = "frozen", "", 0
        if id(p) in optimizer._groups:
            own = (2 + optimizer._adamw.defaults["amsgrad"]) * nbytes(p) + nbytes(torch.tensor(0.0))
            adamw += own
            if optimizer._is_adamw(p):
                rule, stored = "AdamW", own
            else:
                rule = type(optimizer).__name__
                structures = ", ".join(map(str, units[id(p)].structures))
                group = optimizer._groups[id(p)]
                stored = nbytes(p) if group["momentum"] else 0
                if group["graft"] == "adamw":
                    stored += len(grafting.state_names("adamw")) * nbytes(p) + 4
                if id(p) in weights:
                    fresh = optimizer._fresh(weights[id(p)], (), "meta")
                    stored += sum(nbytes(member.tensors()) for member in fresh.values())
        elif p.requires_grad:
            rule = "not given"
        layer = type(module).__name__
        rows.append(Row(name, tuple(p.shape), layer, rule, structures, stored))
    return Plan(tuple(rows), adamw)


def nbytes(value: Any) -> int:
    """Bytes of a tensor, or of all in a container."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(nbytes(v) for v in (value.values() if isinstance(value, dict) else value))


def find_units(
    model: nn.Module, params: set[int], taken: set[int], optional: Collection[type[nn.Module]]
) -> list[Unit]:
    """Supported layers of ``model`` with a weight among ``params`` (ids), none of it ``taken``.

    A weight shared by several layers is one unit if all read it alike; otherwise, or if it is a
    parameter of something else too, it is no unit. A bias belongs to its unit if it is among
    ``params`` as well and shared in the same way. ``optional`` as in
    :func:`singd.layers.find_layer`.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for _, module in model.named_modules():
        for key, p in module._parameters.items():
            if p is not None:
                owners.setdefault(id(p), []).append((module, key))
    free, units = params - taken, dict[int, Unit]()
    for name, module in model.named_modules():
        for layer in find_products(module, optional):
            weight, bias = (module._parameters.get(key) for key in (layer.weight, layer.bias))
            if weight is None or id(weight) not in free - units.keys():
                continue
            shared = [owner for owner, _ in owners[id(weight)]]
            if not weight.is_floating_point() or any(
                layer not in find_products(owner, optional) or key != layer.weight
                for owner, key in owners[id(weight)]
            ):
                continue
            alike = [(owner, layer.bias) for owner in shared]
            if bias is not None and (
                not layer.joins_bias or id(bias) not in free or owners[id(bias)] != alike
            ):
                bias = None
            qualified = f"{name}.{layer.weight}" if name else layer.weight
            units[id(weight)] = Unit(qualified, shared, layer, weight, bias)
    return list(units.values())


def owners_of(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module, str]]:
    """Every parameter once: its name, itself, the module that holds it, and its name there."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None and id(p) not in seen:
                seen.add(id(p))
                yield (f"{prefix}.{name}" if prefix else name), p, module, name
