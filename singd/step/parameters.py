"""Which parameters are preconditioned, and which AdamW trains: an explicit record."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from singd.capture.warning import warn_user
from singd.capture.weight_matrix import (
    WeightMatrix,
    find_tensors,
    find_weight_matrices,
    owners_of,
)
from singd.layers import OPTIONAL
from singd.methods.options import choice
from singd.ops.dtensor import is_distributed
from singd.step.entries import State, is_count
from singd.step.groups import Group, counter_device


class Parameters:
    """The parameters of a model in their groups.

    ``group["handed_over"]`` names those that were preconditioned once, until their use was found to
    be another than their layer describes.

    Args:
        model: Model that is trained.
        layers: Types among :data:`singd.layers.OPTIONAL` that are preconditioned as well.
        by_layer: Whether the weights of known layers are preconditioned; otherwise all parameters
            of two or more dimensions are.
    """

    def __init__(
        self, model: nn.Module, layers: Collection[type[nn.Module]], by_layer: bool = True
    ) -> None:
        self.model, self.layers, self.by_layer = model, tuple(layers), by_layer
        self.matrices: list[WeightMatrix] = []
        self.expected: set[Tensor] = set()  # parameters that were given, or will be at once
        self.group_of: dict[Tensor, Group] = {}
        self._preconditioned: dict[WeightMatrix, Group] | None = None
        self._fallback: list[tuple[Group, list[Tensor]]] = []  # found together with these
        self._order: list[Tensor] = []
        self._names: dict[Tensor, str] = {}
        self._owners: list[tuple[str, nn.Parameter, Any, str, torch.Size]] = []
        self._kinds: dict[Tensor, tuple[Any, ...]] = {}  # of those whose state is like them
        self._known: set[Tensor] = set()  # parameters of the model that nothing is to be said of
        self._frozen: list[Tensor] = []  # those that were not given, and may thaw
        self._parts: list[tuple[nn.Module, tuple[Any, ...]]] = []

    def find(self, given: Sequence[Tensor]) -> list[WeightMatrix]:
        """The new matrices whose weight is among ``given``."""
        self.expected.update(given)
        taken = {matrix.weight for matrix in self.matrices}
        if self.by_layer:
            candidates = find_weight_matrices(self.model, self.expected, taken, self.layers)
        else:
            candidates = find_tensors(self.model, self.expected, taken)
        chosen = set(given)
        return [matrix for matrix in candidates if matrix.weight in chosen]

    def bind(self, groups: Iterable[Group]) -> None:
        """Find the group of every parameter again, after groups were added or replaced."""
        groups = list(groups)
        self.group_of = {p: group for group in groups for p in group["params"]}
        self._preconditioned = None
        self._order = [p for group in groups for p in group["params"]]
        owners = list(owners_of(self.model))
        self._names = {p: name.replace("_orig_mod.", "") for name, p, _, _ in owners}
        self._owners = [
            (name, p, module._parameters, key, p.shape)
            for name, p, module, key in owners
            if p in self.group_of
        ]
        self._kinds = {}
        self._know(owners)

    def name(self, p: Tensor) -> str:
        """The name of a parameter in the model."""
        return self._names.get(p, "a parameter")

    def check(self, groups: Sequence[Group], state: State) -> None:
        """Follow changes of data type and device since the last step.

        Raises:
            ValueError: If a parameter was replaced, resized, added or taken out of its group.
        """
        placed = [p for group in groups for p in group["params"]]
        if len(placed) != len(self._order) or any(p not in self.group_of for p in placed):
            raise ValueError(
                "param_groups: expected the parameters that the optimizer was made with, got "
                "others: use add_param_group, or freeze with requires_grad_(False)"
            )
        if any(self.group_of[p] is not group for group in groups for p in group["params"]):
            self.bind(groups)
        if type(state) is dict:  # in the place of PyTorch's, which has a default
            for p in placed:
                state.setdefault(p, {})
        for name, p, slots, key, shape in self._owners:
            if slots.get(key, p) is not p and not _is_whole_of(slots[key], p):
                raise ValueError(
                    f"{name} was replaced after the optimizer was made (by fully_shard or "
                    "load_state_dict(assign=True)?): make the optimizer afterwards"
                )
            if p.shape != shape:
                raise ValueError(
                    f"{name}: expected the shape {list(shape)} it had when the optimizer was made, "
                    f"got {list(p.shape)}: make a new optimizer"
                )
            kind = (p.dtype, p.device)
            if self._kinds.get(p) != kind:
                self._kinds[p] = kind
                _follow(p, state.get(p, {}))

    def notice_new(self) -> None:
        """Warn of parameters that are new in the model, or no longer frozen, since it was given."""
        is_same = all(_parts_of(module) == parts for module, parts in self._parts)
        if is_same and not any(p.requires_grad for p in self._frozen):
            return
        owners = list(owners_of(self.model))
        new = [n for n, p, _, _ in owners if p.requires_grad and p not in self._known]
        self._know(owners)
        if new:
            warn_user(
                f"{', '.join(new)}: new in the model, or no longer frozen, since the optimizer was "
                "made, and not trained: use add_param_group"
            )

    def _know(self, owners: Iterable[tuple[str, nn.Parameter, Any, str]]) -> None:
        """Remember what the model consists of, with the parameters that it has."""
        others = [p for _, p, _, _ in owners if p not in self.group_of]
        self._frozen = [p for p in others if not p.requires_grad]
        self._known = {p for p in others if p.requires_grad} | self.group_of.keys()
        self._parts = [(module, _parts_of(module)) for module in self.model.modules()]

    # What trains a parameter --------------------------------------------------------------------

    def is_handed_over(self, matrix: WeightMatrix) -> bool:
        """Whether AdamW trains a matrix that a layer was found for."""
        return self.name(matrix.weight) in self.group_of[matrix.weight]["handed_over"]

    def preconditioned(self) -> dict[WeightMatrix, Group]:
        """The matrices that are preconditioned, each with the group of its weight."""
        if self._preconditioned is None:
            self._preconditioned = {
                matrix: self.group_of[matrix.weight]
                for matrix in self.matrices
                if not self.is_handed_over(matrix)
            }
            ours = {p for matrix in self._preconditioned for p in matrix.parameters}
            sorted_: dict[int, tuple[Group, list[Tensor]]] = {}
            for p in self._order:
                if p not in ours:
                    group = self.group_of[p]
                    sorted_.setdefault(id(group), (group, []))[1].append(p)
            self._fallback = list(sorted_.values())
        return self._preconditioned

    def fallback(self) -> list[tuple[Group, list[Tensor]]]:
        """The parameters that AdamW trains, group by group."""
        self.preconditioned()
        return self._fallback

    def refuse_sparse(self, *, all_of_them: bool) -> None:
        """Raise ``RuntimeError`` if a gradient is not dense, of all or of those preconditioned."""
        ours = (p for matrix in self.preconditioned() for p in matrix.parameters)
        for p in self.group_of if all_of_them else ours:
            if p.grad is not None and p.grad.layout is not torch.strided:
                raise RuntimeError(
                    f"{self.name(p)}: expected a dense gradient, got a sparse one: use sparse=False"
                )

    def hand_over(self, reasons: dict[WeightMatrix, str], state: State) -> None:
        """Leave matrices to AdamW, with a warning that says why; their state is dropped."""
        by_reason: dict[str, list[str]] = {}
        for matrix, reason in reasons.items():
            group, name = self.group_of[matrix.weight], self.name(matrix.weight)
            if name in group["handed_over"]:
                continue
            group["handed_over"] = (*group["handed_over"], name)
            self._preconditioned = None
            for p in matrix.parameters:
                state.pop(p, None)
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            warn_user(f"{', '.join(names)}: {reason}; AdamW trains it instead")


def _is_whole_of(held: Any, p: Any) -> bool:
    """Whether a module holds the whole of a sharded parameter, as it does during a pass."""
    return is_distributed(p) and getattr(held, "device_mesh", None) != p.device_mesh


def optional_layers(layers: Any) -> tuple[type[nn.Module], ...]:
    """The types of :data:`singd.layers.OPTIONAL` that were named, or all of them."""
    types = tuple(OPTIONAL if layers == "all" else layers)
    for layer in types:
        choice("layers", layer, tuple(OPTIONAL))
    return types


def check_model(model: Any) -> None:
    """Raise unless ``model`` is a module whose parameters are there."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for name, p in model.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ValueError(f"{name} is not initialised yet: run one forward pass first")


def _parts_of(module: nn.Module) -> tuple[Any, ...]:
    """The modules of a module, and how many parameters it has."""
    own = vars(module)
    return len(own["_parameters"]), *own["_modules"].values()


def _follow(p: Tensor, entry: dict[str, Any]) -> None:
    """Move what is stored like a parameter to its data type and device."""
    for name, value in entry.items():
        if name == "step":
            entry[name] = value.to(counter_device(p))
        elif isinstance(value, Tensor) and is_count(name):
            entry[name] = value.to(p.device)
        elif isinstance(value, Tensor):
            entry[name] = value.to(device=p.device, dtype=p.dtype)
