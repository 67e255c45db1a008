"""The methods of the suite: a name, and options as in ``singd:lr=1e-2,damping=1e-4``."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from torch import nn, optim

from benchmarks.optimizers import Muon

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def adamw(model: nn.Module, lr: float = 1e-3, **options: Any) -> Any:
    trained = [p for p in model.parameters() if p.requires_grad]
    return optim.AdamW(trained, lr=lr, weight_decay=0.0, **options)


def singd(model: nn.Module, **options: Any) -> Any:
    from singd import SINGD

    return SINGD(model, **options)


def automatic(model: nn.Module, like: str, **options: Any) -> Any:
    """SINGD that chooses structures within the bytes of one structure on all sides."""
    from singd import SINGD

    with SINGD(model, structures=(like, like), **options) as fixed:
        rows = fixed.plan().rows
    budget = sum(row.state_bytes for row in rows if row.rule == "SINGD")
    return SINGD(model, structures="auto", budget=budget, **options)


def kfac(model: nn.Module, **options: Any) -> Any:
    from singd import KFAC

    return KFAC(model, **options)


def kl_shampoo(model: nn.Module, **options: Any) -> Any:
    from singd import KLShampoo

    return KLShampoo(model, **options)


def soap(model: nn.Module, **options: Any) -> Any:
    from singd import SOAP

    return SOAP(model, **options)


def their_soap(model: nn.Module, lr: float = 3e-3, **options: Any) -> Any:
    import pytorch_optimizer

    trained = [p for p in model.parameters() if p.requires_grad]
    return pytorch_optimizer.SOAP(trained, lr=lr, **options)


def muon(model: nn.Module, lr: float = 1e-3) -> Any:
    return Muon(model, lr=lr)


class WhitenedMuon(Muon):
    """Muon for gradients that one-sided SINGD has preconditioned: ``G K K^T``."""

    def __init__(self, model: nn.Module, lr: float = 1e-3) -> None:
        from singd import SINGD

        super().__init__(model, lr=lr)
        hidden = [p for part in self.parts[1:] for g in part.param_groups for p in g["params"]]
        one_sided = ("dense", "scaled_identity")
        fixed: dict[str, Any] = {"graft": None, "burn_in": 0, "damping": 1e-3}
        self.inputs = SINGD(model, hidden, structures=one_sided, **fixed) if hidden else None

    def step(self) -> None:
        if self.inputs is not None:
            self.inputs.precondition()
        super().step()


METHODS: dict[str, Callable[..., Any]] = {
    "adamw": adamw,
    "singd": singd,
    "automatic": automatic,
    "kfac": kfac,
    "kl_shampoo": kl_shampoo,
    "soap": soap,
    "pytorch_optimizer.soap": their_soap,
    "muon": muon,
    "whitened_muon": WhitenedMuon,
}


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """A method's name and its options, of ``name`` or ``name:option=value,option=value``.

    Raises:
        ValueError: If there is no such method, or an option is not a Python literal.
    """
    name, _, given = spec.partition(":")
    if name not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
    call = ast.parse(f"_({given})", mode="eval").body
    assert isinstance(call, ast.Call)
    return name, {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}


def make(spec: str) -> Callable[[nn.Module], Any]:
    """A function of a model that makes the optimizer."""
    name, options = parse(spec)
    return lambda model: METHODS[name](model, **options)
