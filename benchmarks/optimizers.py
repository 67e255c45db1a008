"""The optimizers that the benchmarks compare, by name; each is imported when it is used.

Ours are ``singd:STRUCTURE``, with ``+embeddings`` to precondition those as well. Of the others,
SOAP and Distributed Shampoo (Anil et al., arXiv 2002.09018) are those of the package
``pytorch-optimizer``, Muon is PyTorch's. It trains the matrices of hidden layers; convolutions,
embeddings, the last layer and vectors are AdamW's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn, optim

from benchmarks import nets

STRUCTURES = ("dense", "diagonal", "block30diagonal", "hierarchical15_15", "triltoeplitz")
OURS = tuple(f"singd:{structure}" for structure in STRUCTURES)
FIRST_ORDER = ("sgd", "adamw", "adamw-fused")
EXTRA = {"muon": "torch", "soap": "pytorch_optimizer", "shampoo": "pytorch_optimizer"}
LR = 1e-6  # the loss stays where it is


def names() -> tuple[str, ...]:
    """Every method that can run here."""
    extra = [name for name, package in EXTRA.items() if importlib.util.find_spec(package)]
    return (*FIRST_ORDER, *extra, "kfac", *OURS)


def make(name: str, model: nn.Module, T: int, *, peer: bool = False) -> Any:
    """An optimizer that updates its factors, if it has any, at every ``T``-th step.

    Args:
        name: One of :func:`names`, ``ikfac``, ``singd:STRUCTURE`` with any structure, or ``singd``
            with those of the default.
        model: What it trains.
        T: Steps between two updates.
        peer: Whether ``singd`` is the package of that name on PyPI.
    """
    method, _, structure = name.partition(":")
    if method == "sgd":
        return optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    if method in ("adamw", "adamw-fused"):
        choice = {"fused": True} if method == "adamw-fused" else {"foreach": True}
        return optim.AdamW(model.parameters(), lr=LR, **choice)
    if method == "muon":
        return Muon(model)
    if method in ("soap", "shampoo"):
        return _second_order(method, model, T)
    average = "batch+sequence" if isinstance(model, nets.GPT) else "batch"
    options: dict[str, Any] = {"lr": LR, "T": T, "loss_average": average}
    if peer:
        from singd.optim import optimizer as peers  # there is none in ours

        return peers.SINGD(model, structures=(structure, structure), **options)
    from singd import KFAC, SINGD

    if method == "kfac":
        return KFAC(model, **options)
    options["burn_in"] = 0
    if method == "ikfac":
        return SINGD(model, structures=("dense", "dense"), kfac_like=True, **options)
    structure, _, embeddings = structure.partition("+")
    layers = [nn.Embedding] if embeddings else []
    if structure:
        options["structures"] = (structure, structure)
    return SINGD(model, layers=layers, **options)


def _second_order(method: str, model: nn.Module, T: int) -> optim.Optimizer:
    import pytorch_optimizer

    if method == "soap":
        return pytorch_optimizer.SOAP(model.parameters(), lr=LR, precondition_frequency=T)
    return pytorch_optimizer.ScalableShampoo(
        model.parameters(),
        lr=LR,
        start_preconditioning_step=1,
        statistics_compute_steps=T,
        preconditioning_compute_steps=T,
    )


class Muon:
    """Muon for the weights of linear layers but the last, AdamW for all other parameters."""

    def __init__(
        self,
        model: nn.Module,
        lr: float = LR,
        *,
        muon: Mapping[str, Any] | None = None,
        adamw: Mapping[str, Any] | None = None,
    ) -> None:
        hidden = [m.weight for m in model.modules() if isinstance(m, nn.Linear)][:-1]
        mine = {id(p) for p in hidden}
        others = [p for p in model.parameters() if id(p) not in mine]
        options = {"lr": lr, "fused": True, **(adamw or {})}
        self.parts: list[optim.Optimizer] = [optim.AdamW(others, **options)]
        if hidden:
            self.parts.append(optim.Muon(hidden, lr=lr, **(muon or {})))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:
        return {p: state for part in self.parts for p, state in part.state.items()}

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        for part in self.parts:
            part.step()


def state_tensors(optimizer: Any) -> Iterator[Tensor]:
    """What an optimizer keeps from step to step."""
    yield from _tensors(list(optimizer.state.values()))
    for factors in ("Ks", "Cs", "m_Ks", "m_Cs"):  # of PyPI singd
        for matrix in getattr(optimizer, factors, {}).values():
            yield from (tensor for _, tensor in matrix.named_tensors())


def _tensors(thing: Any) -> Iterator[Tensor]:
    """The tensors in nested containers and objects, each once."""
    stack, seen = [thing], set()
    while stack:
        found = stack.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, Tensor):
            yield found
        elif isinstance(found, dict):
            stack += found.values()
        elif isinstance(found, list | tuple):
            stack += found
        elif hasattr(found, "__dict__"):
            stack += vars(found).values()
