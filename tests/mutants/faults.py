"""The faults: every mutant of a module, as a syntax tree."""

from __future__ import annotations

import ast
import collections
import importlib.abc
import importlib.machinery
import linecache
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[2] / "structured"


def path_of(module: str) -> Path:
    """The file of a module, known by its name below the package."""
    path = PACKAGE.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def module_of(path: Path) -> str:
    """The name below the package of the module in a file."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


SWAPS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


# The first two arguments may change places.
SYMMETRIC = (
    "allclose", "broadcast_shapes", "equal", "flip", "joint_norm", "max", "maximum", "min",
    "minimum", "promote_types",
)  # fmt: skip


class Mutant(NamedTuple):
    """One fault, known by its module, its function and what became of the expression."""

    module: str
    function: str
    change: str
    number: int  # of those that read the same
    lines: range  # of the statement
    tree: ast.Module

    @property
    def key(self) -> tuple[str, ...]:
        return (self.module, self.function, self.change, str(self.number))


def faults(node: ast.AST) -> Iterator[ast.AST]:
    """What may be written in place of ``node``."""
    match node:
        case ast.BinOp(left, ast.MatMult(), right):
            yield ast.BinOp(right, ast.MatMult(), left)
        case ast.BinOp(left, op, right) if type(op) in SWAPS:
            yield ast.BinOp(left, SWAPS[type(op)](), right)
        case ast.BoolOp(op, values):
            yield ast.BoolOp(SWAPS[type(op)](), values)
        case ast.Compare(left, [op], rights):
            yield ast.Compare(left, [SWAPS[type(op)]()], rights)
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield operand
        case ast.Constant(bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(int() | float() as value):
            yield ast.Constant(value + 1)
        case ast.Constant(str() as value):
            yield ast.Constant(f"x{value}")
        case ast.Attribute(value, "mT"):
            yield value
        case ast.Slice(lower, upper, step) if lower or upper:
            yield ast.Slice(upper, lower, step)
        case ast.Call(func, [first, second, *rest], keywords) if not _symmetric(node):
            yield ast.Call(func, [second, first, *rest], keywords)
        case ast.IfExp(test, body, orelse):
            yield ast.IfExp(test, orelse, body)
        case ast.If(test, body, orelse) if isinstance(test, ast.Name | ast.Attribute | ast.Call):
            yield ast.If(ast.UnaryOp(ast.Not(), test), body, orelse)
        case ast.Return(value) if value is not None and not isinstance(value, ast.Constant):
            yield ast.Return(ast.Constant(None))
        case ast.Raise() | ast.AugAssign() | ast.Expr(ast.Call()):
            yield ast.Pass()


class Place(NamedTuple):
    """A field of the tree that holds a node to replace."""

    parent: ast.AST
    field: str
    index: int | None
    function: str  # the enclosing one, ``Class.method``
    lines: range  # of the statement, or of the head of a compound one


def places(node: ast.AST, function: str, lines: range) -> Iterator[Place]:
    """The nodes below ``node`` that may be replaced."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases"):
            continue
        for index, child in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(child, ast.AST) or _left_out(child):
                continue
            inside = _lines(child) if isinstance(child, ast.stmt) else lines
            yield Place(node, name, index if isinstance(value, list) else None, function, inside)
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                yield from places(child, f"{function}.{child.name}".lstrip("."), inside)
            elif not isinstance(child, ast.Raise | ast.JoinedStr):
                yield from places(child, function, inside)


def _lines(statement: ast.stmt) -> range:
    last = statement.end_lineno or statement.lineno
    body = getattr(statement, "body", None)
    if body:
        last = max(statement.lineno, body[0].lineno - 1)
    return range(statement.lineno, last + 1)


def _symmetric(call: ast.Call) -> bool:
    """Whether the first two arguments may change places."""
    match call:
        case ast.Call(ast.Attribute(_, "movedim"), [a, b]):
            try:
                return abs(ast.literal_eval(a) - ast.literal_eval(b)) == 1
            except (TypeError, ValueError):
                return False
        case ast.Call(ast.Attribute(_, name) | ast.Name(name)):
            return name in SYMMETRIC
    return False


def _left_out(node: ast.AST) -> bool:
    match node:
        case ast.Expr(ast.Constant()) | ast.AnnAssign(annotation=ast.Name("TypeAlias")):
            return True  # docstrings, types
        case ast.keyword("strict"):
            return True  # of zip: the lengths are equal
        case ast.FunctionDef("__repr__") | ast.If(ast.Name("TYPE_CHECKING")):
            return True
        case ast.Assign([ast.Name("__all__")]):
            return True
        case ast.Call(ast.Name("cast" | "TypeVar")):
            return True
    return False


def mutants(module: str) -> Iterator[Mutant]:
    """All faults of a module, one at a time in one tree: use each before the next."""
    tree = ast.parse(path_of(module).read_text())
    seen: collections.Counter[tuple[str, str]] = collections.Counter()
    for parent, name, index, function, lines in list(places(tree, "", range(0))):
        held = getattr(parent, name)
        node = held if index is None else held[index]
        for fault in faults(node):
            # shown with its surroundings where it is a constant, a name or an operator
            before = ast.unparse(parent if isinstance(node, ast.Constant | ast.Slice) else node)
            ast.copy_location(fault, node)
            _put(parent, name, index, fault)
            after = ast.unparse(parent if isinstance(node, ast.Constant | ast.Slice) else fault)
            if before == after:
                _put(parent, name, index, node)
                continue
            change = " -> ".join(" ".join(text.split())[:100] for text in (before, after))
            number = seen[function, change]
            seen[function, change] += 1
            yield Mutant(module, function, change, number, lines, tree)
            _put(parent, name, index, node)


def _put(parent: ast.AST, name: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, name, node)
    else:
        getattr(parent, name)[index] = node


class Import(importlib.abc.MetaPathFinder):
    """Imports the mutant in place of its module."""

    def __init__(self, mutant: Mutant) -> None:
        self.name = f"structured.{mutant.module}"
        text = ast.unparse(mutant.tree)

        class Loader(importlib.machinery.SourceFileLoader):
            def get_code(self, fullname):
                lines = text.splitlines(keepends=True)  # Triton's interpreter reads the source
                linecache.cache[self.path] = (len(text), None, lines, self.path)
                return compile(text, self.path, "exec")

        self.loader = Loader

    def find_spec(self, name, path, target=None):
        if name != self.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        spec.loader = self.loader(name, spec.origin)
        return spec
