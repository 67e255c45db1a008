"""The plan: which rule trains each parameter, and what it stores."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import nn

from singd.capture import Unit
from singd.layers import find_layer


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


def find_units(
    model: nn.Module, params: set[int], taken: set[int], optional: Collection[type[nn.Module]]
) -> list[Unit]:
    """Supported layers of ``model`` with a weight among ``params`` (ids), none of it ``taken``.

    A weight shared by several layers is one unit if all read it alike; otherwise, or if it is a
    parameter of something else too, it is no unit. A bias belongs to its unit if it is among
    ``params`` as well and shared in the same way. ``optional`` as in
    :func:`singd.layers.find_layer`.
    """
    owners: dict[int, list[nn.Module]] = {}
    for _, module in model.named_modules():
        for p in module._parameters.values():
            if p is not None:
                owners.setdefault(id(p), []).append(module)
    units: dict[int, Unit] = {}
    for name, module in model.named_modules():
        layer, own = find_layer(module, optional), module._parameters
        weight, bias = own.get("weight"), own.get("bias")
        if (
            layer is None
            or weight is None
            or id(weight) not in params - taken
            or id(weight) in units
        ):
            continue
        shared = owners[id(weight)]
        if any(find_layer(owner, optional) is not layer for owner in shared):
            continue
        if not weight.is_floating_point():
            continue
        if bias is not None and (
            not layer.joins_bias or id(bias) not in params - taken or owners[id(bias)] != shared
        ):
            bias = None
        qualified = f"{name}.weight" if name else "weight"
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
