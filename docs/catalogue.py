"""One example of every named structure, found through the names that specs know."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from structured import Structure, parse
from structured._core.spec import known

# Options that read better than those made up from the signature.
EXAMPLES = {
    "block_circulant": "block_circulant(2)",
    "block_diagonal": "block_diagonal(3)",
    "block_lower": "block_lower(dense, diagonal, 4)",
    "block_upper": "block_upper(lower_toeplitz, dense, 8)",
    "direct_sum": "direct_sum(dense, lower_toeplitz, 4)",
    "group_algebra": "group_algebra(dihedral)",
    "hierarchical": "hierarchical(2, 3)",
    "hypercomplex": "hypercomplex(2)",
    "incidence": "incidence(divisors)",
    "kron": "kron(lower_triangular, circulant, 3)",
    "low_rank_lower": "low_rank_lower(3)",
    "low_rank_upper": "low_rank_upper(-3)",
    "rotated": "rotated(diagonal, cosine)",
    "strided": "strided(3, dense)",
    "tied": "tied(3, dense)",
    "transposed": "transposed(hierarchical(2, 3))",
    "up_to": "up_to(8192, dense, diagonal)",
}


def makers() -> dict[str, Callable[..., Any]]:
    """Every built-in name and its class or function."""
    found = {}
    for name, make in known().items():
        target = make if inspect.isfunction(make) and make.__name__ == name else make().factory
        if target.__module__.split(".")[0] == "structured":
            found[name] = target
    return found


def signature(name: str) -> list[inspect.Parameter]:
    """The options of a structure: what follows ``n`` in the call."""
    target = makers()[name]
    zeros = getattr(target, "zeros", None)
    parameters = list(inspect.signature(zeros or target).parameters.values())
    positional = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [p for p in parameters[1 if zeros else 0 :] if p.kind in positional]


def example(name: str) -> str:
    """A spec that uses ``name``; options not listed above are made up from their annotations."""
    if name in EXAMPLES:
        return EXAMPLES[name]
    options = []
    for parameter in signature(name):
        if parameter.default is not parameter.empty:
            break
        is_number = "int" in str(parameter.annotation)
        options.append("3" if is_number else "diagonal" if "dense" in options else "dense")
    return f"{name}({', '.join(options)})" if options else name


def modules() -> Iterator[tuple[ModuleType, list[str]]]:
    """Every structure file with the names that it defines, the simplest first."""
    by_module: dict[str, list[str]] = {}
    for name, target in makers().items():
        by_module.setdefault(target.__module__, []).append(name)

    def rank(module: str) -> tuple[int, int, str]:
        found = by_module[module]
        return needs(found), stored(structure(found[0]), 12), module

    for module in sorted(by_module, key=rank):
        yield sys.modules[module], sorted(by_module[module], key=line)


def needs(names: list[str]) -> int:
    """0 for a structure without options, 1 with numbers, 2 with other structures."""
    annotations = [str(p.annotation) for name in names for p in signature(name)]
    return max([0, *(1 if "int" in a else 2 for a in annotations)])


def line(name: str) -> int:
    """Where the source of ``name`` begins."""
    return inspect.getsourcelines(makers()[name])[1]


def names() -> list[str]:
    """Every built-in name, in the order of the catalogue."""
    return [name for _, found in modules() for name in found]


def structure(name: str) -> Structure:
    """The example of ``name``."""
    return parse(example(name))


def stored(structure: Structure, n: int) -> int:
    """How many numbers a member of size ``n`` stores."""
    return sum(t.numel() for t in structure(n, device="meta").tensors())
