"""Checkpoints in other forms: as text, in other structures, and those of PyPI ``singd`` 0.0.5."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from singd.capture.weight_matrix import WeightMatrix
from singd.ops.dtensor import whole
from singd.ops.storage import decode
from singd.optimizer import KroneckerOptimizer
from singd.state import checkpoint
from singd.step.entries import recognized, state_key
from singd.step.groups import as_groups, parameter_of
from structured import StructuredMatrix

# As tensors and text -----------------------------------------------------------------------------


def to_tensors(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A state as named tensors and text, for files that hold nothing else, such as safetensors.

    Args:
        state_dict: What ``optimizer.state_dict()`` returned.

    Returns:
        Tensors by name, and metadata.
    """
    tensors = {}
    for number, values in state_dict["state"].items():
        for key, value in values.items():
            for index, t in value.items() if isinstance(value, Mapping) else [("", value)]:
                tensors[f"{number}.{key}.{index}"] = t
    groups = json.dumps(state_dict["param_groups"], default=_as_text)
    return tensors, {"param_groups": groups}


def from_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    """The state that :func:`to_tensors` turned into tensors and text."""
    groups = json.loads(metadata["param_groups"])
    for group in groups:
        for key, value in group.items():
            if isinstance(value, list) and key not in ("params", "param_names"):
                group[key] = tuple(map(_from_text, value))
    state: dict[int, Any] = {number: {} for group in groups for number in group["params"]}
    for name, t in tensors.items():
        number, _, rest = name.partition(".")
        key, _, index = rest.rpartition(".")  # keys of packed attention have a dot themselves
        if index:
            state[int(number)].setdefault(key, {})[int(index)] = t
        else:
            state[int(number)][key] = t
    return {"state": state, "param_groups": groups}


def _as_text(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, Tensor) and value.numel() == 1:  # such as a learning rate
        return value.item()
    raise TypeError(f"to_tensors: expected numbers, strings and dtypes, got {value!r}")


def _from_text(value: Any) -> Any:
    """The value, or the dtype of that name: ``"torch.int8"``, where ``"int8"`` is a form."""
    module, _, name = str(value).partition(".")
    named = getattr(torch, name, None) if module == "torch" else None
    return named if isinstance(named, torch.dtype) else value


# Of other structures ------------------------------------------------------------------------------

_STRUCTURAL = ("structures", "max_dim", "wide_structure")


def to_structures(optimizer: KroneckerOptimizer, saved: Mapping[str, Any]) -> dict[str, Any]:
    """A state of other structures, for ``optimizer.load_state_dict``.

    Every factor and momentum becomes the nearest member of the structure that ``optimizer`` has for
    it: the same matrix where that holds it, so that a run goes on in a larger structure as it was.

    Args:
        optimizer: Made for the same model by the same method, with other structures.
        saved: What ``state_dict()`` of the optimizer with the former structures returned.

    Raises:
        ValueError: If ``saved`` is of other groups, structures are still to be chosen
            (``"auto"``), or the nearest member to a factor is singular.
    """
    state = {number: dict(entry) for number, entry in saved["state"].items()}
    packed = [dict(group) for group in saved["param_groups"]]
    own = optimizer.param_groups
    if [len(g["params"]) for g in own] != [len(g["params"]) for g in packed]:
        raise ValueError("to_structures: expected groups of as many parameters, got others")
    for group, there in zip(own, packed, strict=True):
        former = group | {k: checkpoint.tupled(v) for k, v in there.items() if k != "params"}
        if "auto" in (group.get("structures"), former.get("structures")):
            raise ValueError("to_structures: expected structures that are chosen, got 'auto'")
        numbers = dict(zip(group["params"], there["params"], strict=True))
        blanks = (optimizer.blank_factors(options) for options in (former, group))
        for (matrix, before), (_, now) in zip(*blanks, strict=True):
            entry = state.setdefault(numbers[matrix.weight], {})
            _restructure(matrix, before.members(), now.members(), entry)
        there |= {k: checkpoint.plain(group[k]) for k in _STRUCTURAL if k in group}
    return {**saved, "state": state, "param_groups": packed}


def _restructure(
    matrix: WeightMatrix,
    before: Mapping[str, StructuredMatrix],
    now: Mapping[str, StructuredMatrix],
    entry: dict[str, Any],
) -> None:
    """Write the factors of one matrix anew, as members of other structures."""
    for name, member in before.items():
        key = state_key(matrix, name)
        if key not in entry or name not in now:
            continue
        tensors = [whole(t) for t in checkpoint.listed(entry[key])]
        forms = recognized(matrix, key, tensors, [t.shape for t in member.tensors()])
        dense = member.with_tensors(decode(tensors, forms)).to_dense()
        nearest = now[name].to(dense.device, dense.dtype).orthogonal_project(dense)
        if not name.startswith("m_") and not nearest.logdet().isfinite().all():
            raise ValueError(
                f"to_structures: the nearest member to {key} of {matrix.name} is singular"
            )
        entry[key] = dict(enumerate(nearest.tensors()))


# Of PyPI singd -----------------------------------------------------------------------------------

_MODULES = {
    "dense": "DenseMatrix",
    "diagonal": "DiagonalMatrix",
    "blockdiagonal": "Block30DiagonalMatrix",
    "hierarchical": "Hierarchical15_15Matrix",
    "triltoeplitz": "TrilToeplitzMatrix",
    "triutoeplitz": "TriuToeplitzMatrix",
}
_OPTIONS = (
    *("lr", "momentum", "damping", "alpha1", "weight_decay", "T", "loss_average", "lr_cov"),
    *("structures", "kfac_approx", "kfac_like", "preconditioner_dtype", "normalize_lr_cov"),
    "initial_lr",  # of a scheduler
)


class Stored:
    """Stands in for a structured matrix of PyPI ``singd``: its tensors, by name."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors in their order there."""
        return {name: getattr(self, name) for name in vars(self)["_tensor_names"]}

    def ours(self) -> dict[int, Tensor]:
        """The tensors as we store them: those of hierarchical matrices by whole rows."""
        there = list(self.tensors().values())
        if len(there) == 5:
            A, B, C, D, E = there
            there = [torch.cat([A, B], 1), C, torch.cat([D, E], 1)]
        return dict(enumerate(there))


def read(path: str | os.PathLike[str]) -> Any:
    """What ``torch.save`` wrote with PyPI ``singd``, which need not be installed.

    Nothing but tensors, containers and its six structures is let in (``weights_only=True``).
    """
    named: list[Any] = [
        (Stored, f"singd.structures.{file}.{name}") for file, name in _MODULES.items()
    ]
    with torch.serialization.safe_globals(named):
        return torch.load(path, weights_only=True, map_location="cpu")


def from_pypi(
    optimizer: KroneckerOptimizer, saved: Mapping[str, Any], params: Iterable[Any] | None = None
) -> dict[str, Any]:
    """The state of PyPI ``singd``, for ``optimizer.load_state_dict``.

    Factors, momenta, options and the number of steps are taken over. Options that it does not know
    are those of ``optimizer``; with those of the paper's bare rule, see :class:`singd.SINGD`, a run
    goes on as it would.

    Args:
        optimizer: Made for the same model, with the same structures and ``kfac_like``.
        saved: Its ``state_dict``, from :func:`read`.
        params: The parameters or groups as they were given to it; ``None`` if it was given none.

    Raises:
        ValueError: If a layer or a parameter of ``optimizer`` is not in ``saved``, or was saved
            between a backward pass and its step.
    """
    if saved.get("H_Ks"):
        raise ValueError("from_pypi: saved between a backward pass and its step")
    state = optimizer.state_dict()
    origins = _origins(optimizer.model, saved, params)
    layers = {row.parameter for row in optimizer.plan().rows if row.structures}
    for own, packed in zip(optimizer.param_groups, state["param_groups"], strict=True):
        found: list[Mapping[str, Any]] = []
        triples = zip(own["params"], packed["params"], packed["param_names"], strict=True)
        for p, number, name in triples:
            if name not in layers:
                continue
            if p not in origins:
                raise ValueError(f"from_pypi: {name} was not trained there")
            origin, group = origins[p]
            found += [] if group in found else [group]
            entry = dict(saved["state"].get(origin, {}))
            if p.ndim > 1:
                entry |= _factors(name.rpartition(".")[0], saved)
            state["state"][number] = entry
        if len(found) > 1:
            raise ValueError("from_pypi: a group holds parameters of several groups there")
        for group in found:
            packed |= {k: group[k] for k in _OPTIONS if k in group}
            packed |= {"step": saved["steps"], "burn_in": 0}  # there is none in PyPI's
    return state


def _factors(layer: str, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The factors of a layer and their momenta, as we store them."""
    if layer not in saved["Ks"]:
        raise ValueError(f"from_pypi: expected a layer {layer!r}, got {', '.join(saved['Ks'])}")
    keys = ("K", "C", "m_K", "m_C")
    return {key: saved[f"{key}s"][layer].ours() for key in keys if layer in saved[f"{key}s"]}


def _origins(
    model: nn.Module, saved: Mapping[str, Any], params: Iterable[Any] | None
) -> dict[Tensor, tuple[int, Mapping[str, Any]]]:
    """Number and group there of every parameter."""
    groups = as_groups(_default(model) if params is None else params, model)
    flat = [parameter_of(p) for group in groups for p in group["params"]]
    places = [(n, group) for group in saved["param_groups"] for n in group["params"]]
    if len(places) != len(flat):
        raise ValueError(f"from_pypi: expected {len(places)} parameters, got {len(flat)}")
    return dict(zip(flat, places, strict=True))


def _default(model: nn.Module) -> list[Any]:
    """The parameters that it trains if it is given none, in its order."""
    layers = (m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    leaves = (m for m in layers if not any(m.children()))
    return [p for m in leaves for p in m.parameters() if p.requires_grad]
