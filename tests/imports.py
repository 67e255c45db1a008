"""How the modules of a package import each other, read off their syntax trees."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType

Trees = Mapping[str, ast.Module]


def loaded_by(package: str) -> set[str]:
    """What importing a package loads that is not Python's own, where PyTorch is there already.

    Every module of a new package counts, and of PyTorch whatever ``import torch`` leaves out: such
    as ``torch._dynamo``, which takes seconds.
    """
    code = f"""
import sys, torch
before = set(sys.modules)
import {package}
new = sys.modules.keys() - before
print(*(m if m.startswith("torch.") else m.partition(".")[0] for m in new))
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(done.stdout.split()) - sys.stdlib_module_names


def trees(package: ModuleType) -> dict[str, ast.Module]:
    """The syntax tree of every module of a package."""
    root = Path(str(package.__file__)).parent
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = (package.__name__, *path.relative_to(root).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = ast.parse(path.read_text())
    return found


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module and every name of a module that is imported, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, "expected absolute imports"
            assert not node.level, "expected absolute imports"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def needs(modules: Trees) -> dict[str, set[str]]:
    """For each module those of the same package that it imports."""
    graph: dict[str, set[str]] = {}
    for name, tree in modules.items():
        longest = (
            next((m for m in (full, full.rpartition(".")[0]) if m in modules), name)
            for full in imported(tree)
        )
        graph[name] = set(longest) - {name}
    return graph


def upward(modules: Trees, order: Sequence[str]) -> list[str]:
    """Imports against the order of the folders.

    Args:
        modules: What :func:`trees` returned.
        order: Folders or modules below the package, the lowest first; ``""`` for whatever is not
            listed. What is listed most closely counts.
    """

    def rank(name: str) -> int:
        below = name.partition(".")[2]
        fitting = [o for o in order if o == "" or f"{below}.".startswith(f"{o}.")]
        return order.index(max(fitting, key=len))

    return [
        f"{name} imports {other}"
        for name, others in needs(modules).items()
        for other in sorted(others)
        if rank(other) > rank(name)
    ]


def circle(modules: Trees) -> list[str]:
    """A circle of modules that import each other, if there is one; packages stand for no module."""
    graph = {
        name: {o for o in others if not name.startswith(f"{o}.")}
        for name, others in needs(modules).items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def hidden(modules: Trees) -> list[str]:
    """Modules that import something for the type checker alone."""
    return [
        name
        for name, tree in modules.items()
        if any(full.endswith("TYPE_CHECKING") for full in imported(tree))
    ]


def private(modules: Trees) -> list[str]:
    """Underscore names of one module that another one imports, or reads off an object."""
    defined = {name: set(_defined(tree)) for name, tree in modules.items()}
    everything = set().union(*defined.values())
    found = []
    for name, tree in modules.items():
        read = {f for f in imported(tree) if f.partition(".")[0] == name.partition(".")[0]}
        names = {f.rpartition(".")[2] for f in read - modules.keys()}
        names |= set(_attributes(tree)) & everything - defined[name]
        found += [f"{name} reads {n}" for n in sorted(names) if _is_private(n)]
    return found


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def _defined(tree: ast.AST) -> Iterator[str]:
    """Underscore names that a module defines, at whatever depth."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name


def _attributes(tree: ast.AST) -> Iterator[str]:
    """Attributes read off anything but ``self``, ``cls`` and ``super()``."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                pass
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super"))):
                pass
            case ast.Attribute(attr=name, ctx=ast.Load()) if _is_private(name):
                yield name
