"""How many faults in ``structured/`` the tests see: ``python -m tests.mutants --sample 20``.

A mutant is the package with one small fault; it is killed if a check fails or takes too long. Each
runs in a fork of a process that has PyTorch imported: first the laws, on the structures that the
module is about, then the test files on it. Not mutated: annotations, docstrings, messages of
errors, ``__repr__``, decorators, and the kit that states the laws (``tests/structured/test_broken``
is what watches the watchmen).

Results go to ``build/mutants.csv``; killed mutants are not run again while their module is the
same. ``tests/mutants_survivors.csv`` lists the harmless ones, each with its reason. The exit status
is 1 if fewer than 90 % of the others are killed, or one survives that is not listed.
"""

from __future__ import annotations

import argparse
import ast
import collections
import csv
import hashlib
import importlib.abc
import importlib.machinery
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "build" / "mutants.csv"
HARMLESS = ROOT / "tests" / "mutants_survivors.csv"
KIT = ("_laws", "_conduct", "_strategies", "testing")
TIMEOUT = 120  # seconds; the checks of the slowest module take half of it on a busy core
ENOUGH = 0.9
UNCHANGED = "unchanged"  # the control: the checks pass without a fault

# module -> names in the specs of its structures ("" for all), test files, words in test names
NAMES = {
    "_fft": ("toeplitz", "circulant"),
    "block_triangular": ("block_upper", "block_lower", "hierarchical", "low_rank"),
    "triangular": ("lower_triangular", "upper_triangular"),
    "interop": (),
    "_inverse_root": (),
    "_module": (),
    "_matrix": ("",),
    "_spec": (),
    "_coordinates": ("hierarchical",),
    "_definition": ("dense", "low_rank"),
}
FILES = {
    "interop": ["test_interop"],
    "_inverse_root": ["test_inverse_root"],
    "_module": ["test_module"],
    "_coordinates": ["test_defaults"],
    "_matrix": ["test_defaults", "test_families", "test_module", "test_imports", "test_interop"],
    "_spec": ["test_laws", "test_families", "test_imports"],
}
# test_families, less its laws: those ran before
PARTICULAR = "against_scipy or commute or bas or intermediate or divide or part"
WORDS = {"_spec": "spec or alias or unknown or names or divide or import or bases"}

SWAPS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


class Mutant(NamedTuple):
    """One fault, known by its module, its function and what became of the expression."""

    module: str
    function: str
    change: str
    number: int  # of those that read the same
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
        case ast.Call(func, [first, second, *rest], keywords):
            yield ast.Call(func, [second, first, *rest], keywords)
        case ast.IfExp(test, body, orelse):
            yield ast.IfExp(test, orelse, body)
        case ast.If(test, body, orelse) if isinstance(test, ast.Name | ast.Attribute | ast.Call):
            yield ast.If(ast.UnaryOp(ast.Not(), test), body, orelse)
        case ast.Return(value) if value is not None and not isinstance(value, ast.Constant):
            yield ast.Return(ast.Constant(None))
        case ast.Raise() | ast.AugAssign() | ast.Expr(ast.Call()):
            yield ast.Pass()


def places(node: ast.AST, function: str) -> Iterator[tuple[ast.AST, str, int | None, str]]:
    """Fields of the tree that hold a node to replace: parent, field, index, enclosing function."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases"):
            continue
        for index, child in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(child, ast.AST) or _left_out(child):
                continue
            yield node, name, index if isinstance(value, list) else None, function
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                yield from places(child, f"{function}.{child.name}".lstrip("."))
            elif not isinstance(child, ast.Raise | ast.JoinedStr):
                yield from places(child, function)


def _left_out(node: ast.AST) -> bool:
    match node:
        case ast.Expr(ast.Constant()) | ast.AnnAssign(annotation=ast.Name("TypeAlias")):
            return True  # docstrings, types
        case ast.FunctionDef("__repr__") | ast.If(ast.Name("TYPE_CHECKING")):
            return True
        case ast.Assign([ast.Name("__all__")]):
            return True
        case ast.Call(ast.Name("cast" | "TypeVar")):
            return True
    return False


def mutants(module: str) -> Iterator[Mutant]:
    """All faults of a module, one at a time in one tree: use each before the next."""
    tree = ast.parse((ROOT / "structured" / f"{module}.py").read_text())
    seen: collections.Counter[tuple[str, str]] = collections.Counter()
    for parent, name, index, function in list(places(tree, "")):
        held = getattr(parent, name)
        node = held if index is None else held[index]
        for fault in faults(node):
            # shown with its surroundings where it is a constant, a name or an operator
            before = ast.unparse(parent if isinstance(node, ast.Constant | ast.Slice) else node)
            ast.copy_location(fault, node)
            _put(parent, name, index, fault)
            after = ast.unparse(parent if isinstance(node, ast.Constant | ast.Slice) else fault)
            change = " -> ".join(" ".join(text.split())[:100] for text in (before, after))
            number = seen[function, change]
            seen[function, change] += 1
            yield Mutant(module, function, change, number, tree)
            _put(parent, name, index, node)


def _put(parent: ast.AST, name: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, name, node)
    else:
        getattr(parent, name)[index] = node


class Import(importlib.abc.MetaPathFinder):
    """Imports the mutant in place of its module."""

    def __init__(self, mutant: Mutant) -> None:
        self.name = f"structured.{mutant.module}".removesuffix(".__init__")
        tree = ast.fix_missing_locations(mutant.tree)

        class Loader(importlib.machinery.SourceFileLoader):
            def get_code(self, fullname):
                return compile(tree, self.path, "exec")

        self.loader = Loader

    def find_spec(self, name, path, target=None):
        if name != self.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        spec.loader = self.loader(name, spec.origin)
        return spec


def survives(module: str) -> bool:
    """Whether every check passes; in the process that the mutant was imported in."""
    from structured.testing import LAWS, check
    from tests.structured.algebras import ALGEBRAS
    from tests.structured.specs import NESTINGS, SPECS
    from tests.structured.test_families import SPECS as FAMILIES

    names = NAMES.get(module, (module,))
    laws = [law for law in LAWS if law != "compiled"]
    specs = [spec for spec in SPECS if any(name in spec for name in names)]
    for spec in specs[: 2 if "" in names else 8]:
        check(spec, laws=laws, sizes=SPECS[spec], examples=8, shrink=False)
    if "" in names or module == "_coordinates":
        for algebra, sizes in ALGEBRAS.items():
            check(algebra, laws=laws, sizes=sizes, examples=8, shrink=False)
        check(NESTINGS, laws=laws, examples=8, shrink=False)
    for spec in FAMILIES:
        if isinstance(spec, str) and any(name and name in spec for name in names):
            check(spec, laws=laws, sizes=(0, 12), examples=4, shrink=False)

    import pytest

    files = FILES.get(module, ["test_families"])
    words = WORDS.get(module, "" if module in FILES else PARTICULAR)
    kept = f"({words}) and not compil" if words else "not compil"
    paths = [str(ROOT / "tests" / "structured" / f"{file}.py") for file in files]
    return pytest.main(["-x", "--assert=plain", "-p", "no:cacheprovider", "-k", kept, *paths]) in (
        0,
        5,
    )


def _child(mutant: Mutant | None, module: str) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    status = 1
    try:
        if mutant is not None:
            sys.meta_path.insert(0, Import(mutant))
        status = 0 if survives(module) else 1
    finally:
        os._exit(status)


def warm() -> None:
    """Import and run once what every child needs, then forget the package itself."""
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # Hypothesis's own comes too late
    import linear_operator  # noqa: F401
    import pytest  # noqa: F401
    import scipy.fft
    import scipy.linalg
    import scipy.sparse.linalg  # noqa: F401

    import tests.conftest  # noqa: F401  # one thread, a Hypothesis profile without chance
    from structured.testing import LAWS, check

    check("circulant", laws=[law for law in LAWS if law != "compiled"], examples=5)
    for name in [m for m in sys.modules if m.split(".")[0] == "structured"]:
        del sys.modules[name]


def source_of(module: str) -> str:
    return hashlib.sha256((ROOT / "structured" / f"{module}.py").read_bytes()).hexdigest()[:12]


def read(path: Path) -> list[list[str]]:
    return list(csv.reader(path.open())) if path.exists() else []


def main() -> int:
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, help="mutants of each module; all by default")
    parser.add_argument("--files", nargs="*", help="modules; all but the kit by default")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    found = sorted(path.stem for path in (ROOT / "structured").glob("*.py"))
    modules = options.files or [name for name in found if name not in (*KIT, "__init__")]

    RESULTS.parent.mkdir(exist_ok=True)
    done = {(*row[:4], row[4]): row[5] for row in read(RESULTS)}
    harmless = {tuple(row[:4]) for row in read(HARMLESS)[1:]}
    warm()
    fork = multiprocessing.get_context("fork")
    chosen: dict[str, set[int]] = {}
    for module in modules:
        total = sum(1 for _ in mutants(module))
        count = min(options.sample or total, total)
        chosen[module] = set(random.Random(module).sample(range(total), count))
    outcome: dict[tuple[str, ...], str] = {}
    running: list[tuple] = []
    bar = tqdm(total=len(chosen) + sum(map(len, chosen.values())), unit="mutant", smoothing=0.05)
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file)

        def collect(most: int) -> None:
            while len(running) > most:
                for entry in list(running):
                    process, key, source, start = entry
                    late = time.monotonic() - start > TIMEOUT
                    if process.is_alive() and not late:
                        continue
                    process.kill()
                    process.join()
                    result = "timeout" if late else "killed" if process.exitcode else "survived"
                    outcome[key] = result
                    writer.writerow([*key, source, result])
                    file.flush()
                    running.remove(entry)
                    bar.update()
                time.sleep(0.02)

        for module in modules:
            source = source_of(module)
            collect(options.jobs - 1)
            control = fork.Process(target=_child, args=(None, module))
            control.start()
            running.append((control, (module, "", UNCHANGED, "0"), source, time.monotonic()))
            for number, mutant in enumerate(mutants(module)):
                if number not in chosen[module]:
                    continue
                before = done.get((*mutant.key, source))
                if before in ("killed", "timeout"):
                    outcome[mutant.key] = before
                    bar.update()
                    continue
                collect(options.jobs - 1)
                process = fork.Process(target=_child, args=(mutant, module))
                process.start()
                running.append((process, mutant.key, source, time.monotonic()))
        collect(0)
    bar.close()
    return report(outcome, harmless)


def report(outcome: dict[tuple[str, ...], str], harmless: set[tuple[str, ...]]) -> int:
    failed = [key[0] for key in outcome if key[2] == UNCHANGED and outcome[key] != "survived"]
    if failed:
        print("the checks fail without a fault:", ", ".join(failed))
        return 1
    outcome = {key: result for key, result in outcome.items() if key[2] != UNCHANGED}
    by_module = collections.defaultdict(collections.Counter)
    for key, result in outcome.items():
        known = result == "survived" and key in harmless
        by_module[key[0]]["harmless" if known else result] += 1
    total = collections.Counter()
    for module, counts in by_module.items():
        total += counts
        print(f"{module:18}", ", ".join(f"{counts[name]} {name}" for name in sorted(counts)))
    for key, result in outcome.items():
        if result == "survived" and key not in harmless:
            print("survived:", *key)
    killed, survived = total["killed"] + total["timeout"], total["survived"]
    share = killed / max(1, killed + survived)
    print(f"{killed} of {sum(total.values())} mutants killed, {total['harmless']} harmless: "
          f"{share:.1%} of the others")  # fmt: skip
    return int(bool(survived) or share < ENOUGH)


if __name__ == "__main__":
    raise SystemExit(main())
