"""The API reference: what the packages export, in groups; every name once."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType

import singd
import structured
from structured import StructuredMatrix

Groups = Mapping[str, tuple[str, ...]]

# Groups of exported names; the first classes have all their members shown, the others their own.
STRUCTURED: Groups = {
    "The base class": ("StructuredMatrix",),
    "Names of structures": ("parse", "Structure", "StructureLike"),
    "Structures": (
        *("Dense", "Diagonal", "ScaledIdentity", "BlockDiagonal", "LowerTriangular"),
        *("UpperTriangular", "LowerToeplitz", "UpperToeplitz", "Circulant", "BlockCirculant"),
        "Hierarchical",
    ),
    "Algebras": (
        *("GroupAlgebra", "centrosymmetric", "Incidence"),
        *("Hypercomplex", "complex_numbers", "quaternions"),
    ),
    "Compositions": (
        *("BlockLower", "BlockUpper", "low_rank_lower", "low_rank_upper", "DirectSum", "Tied"),
        *("Strided", "Rotated", "Transposed", "Kron", "up_to"),
    ),
    "Operators": ("Operator", "Kronecker", "Sum", "Product", "Outer"),
    "Roots of matrices": ("inverse_root", "divergence"),
    "Costs": ("cost",),
    "Training and extending": (
        *("StructuredParameter", "static", "add_symmetric_product_", "pack_symmetric"),
        "unpack_symmetric",
    ),
}
SINGD: Groups = {
    "Optimizers": ("KroneckerOptimizer", "SINGD", "KLShampoo", "SOAP", "KFAC"),
    "Structures from a budget": ("choose_structures",),
    "Trained factors": ("export",),
    "Methods of your own": ("Method", "Factors", "Averages"),
    "Layers": ("Layer", "register_layer"),
}
# Modules with more to use than what the packages export, and what is left out of each.
MODULES: Groups = {
    "structured.costs": ("cost", "cost_of"),
    "structured.testing": (),
    "structured.interop": (),
    "structured.kernels": (),
    "singd.factors": ("export",),
    "singd.factors.interop": (),
    "singd.update": (),
    "singd.layers": ("Layer", "register_layer"),
    "singd.testing": (),
    "singd.state.plan": (),
    "singd.diagnostics": (),
    "singd.convert": (),
}
ALIASES = {
    "StructureLike": "What :func:`structured.parse` takes: specs, classes, structures, callables.",
}
# What a member can do; all else is in a last group.
MEMBERS: Groups = {
    "What a structure must have": ("zeros", "to_dense"),
    "Products": (
        *("apply", "apply_transpose", "matmul", "mT", "gram", "outer", "congruence"),
        "add_scaled_identity",
    ),
    "Projections": (
        *("project", "project_gram", "orthogonal_project", "orthogonal_project_gram"),
        *("closed_under_transpose", "closed_under_congruence"),
    ),
    "Inverses": ("solve", "solve_member", "inverse"),
    "Numbers": ("trace", "trace_product", "logdet", "max_abs", "frobenius_norm"),
}


def page(package: ModuleType) -> str:
    """What a package exports, and its further modules, in reStructuredText."""
    name, groups = package.__name__, STRUCTURED if package is structured else SINGD
    listed = [each for group in groups.values() for each in group] + ["__version__"]
    more = tuple(each for each in package.__all__ if each not in listed)
    groups = {**groups, "More": more} if more else groups
    out = [heading(f"``{name}``", "="), f".. automodule:: {name}", ""]
    for title, names in groups.items():
        out += [heading(title, "-")]
        for each in names:
            out += [*entry(package, each), ""]
    for module, without in MODULES.items():
        if module.startswith(f"{name}."):
            out += [heading(f"``{module}``", "-"), f".. automodule:: {module}", "   :members:"]
            out += [f"   :exclude-members: {', '.join(without)}"] if without else []
            out += [""]
    return "\n".join(out)


def heading(text: str, line: str) -> str:
    return f"{text}\n{line * len(text)}\n"


def entry(package: ModuleType, name: str) -> Iterator[str]:
    """The directives of one exported name."""
    thing, path = getattr(package, name), f"{package.__name__}.{name}"
    if thing is StructuredMatrix:
        yield f".. autoclass:: {path}"
        for title, names in members().items():
            yield f"\n   .. rubric:: {title}\n"
            yield from (f"   .. {kind(thing, each)}:: {path}.{each}" for each in names)
    elif name in ALIASES:
        yield f".. py:data:: {path}\n\n   {ALIASES[name]}"
    elif not inspect.isclass(thing):
        yield f".. autofunction:: {path}"
    elif issubclass(thing, StructuredMatrix):
        own = [k for k in vars(thing) if k[0] != "_" and not hasattr(StructuredMatrix, k)]
        yield f".. autoclass:: {path}"
        yield f"   :members: {', '.join(['zeros', *own])}\n"
        yield from fields(thing)
    else:
        yield f".. autoclass:: {path}\n   :members:\n   :show-inheritance:"


def members() -> dict[str, list[str]]:
    """The members of the base class in groups, in the order of their definition."""
    every = [k for cls in StructuredMatrix.__mro__ for k in vars(cls) if not k.startswith("_")]
    grouped = {k for names in MEMBERS.values() for k in names}
    rest = [k for k in dict.fromkeys(every) if k not in grouped]
    return {
        **{title: list(names) for title, names in MEMBERS.items()},
        "Shapes, copies and stored tensors": rest,
    }


def kind(cls: type, name: str) -> str:
    """The directive for a member of a class."""
    found = inspect.getattr_static(cls, name)
    if isinstance(found, property):
        return "autoproperty"
    return "automethod" if callable(getattr(cls, name)) else "autoattribute"


def fields(cls: type[StructuredMatrix]) -> Iterator[str]:
    """What a structure stores, with the comment that says the shape."""
    for name, comment in shapes(cls):
        if comment:
            yield f"   | ``{name}``: {literal(comment)}"


def shapes(cls: type[StructuredMatrix]) -> Iterable[tuple[str, str]]:
    """The fields of a structure and what its source says of them."""
    source = "".join(inspect.getsource(c) for c in reversed(cls.__mro__) if c is not object)
    for field in dataclasses.fields(cls):
        found = re.findall(rf"^    {field.name}: .*?  # (.*)$", source, re.M)
        yield field.name, found[-1] if found else ""


def literal(comment: str) -> str:
    """Shapes and formulas of a comment in the type of code."""
    return re.sub(r"\[[^\]]*\]", lambda m: f"``{m[0]}``", comment)


PACKAGES = (structured, singd)
