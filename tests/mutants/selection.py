"""The tests: what each reaches without a fault, and which of them a mutant runs."""

from __future__ import annotations

import collections
import gc
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.mutants.faults import PACKAGE, Import, Mutant, module_of

TESTS = PACKAGE.parent / "tests"
FILES = sorted({*TESTS.glob("structured/test_*.py")} - {TESTS / "structured" / "test_broken.py"})
FILES += [TESTS / "kernels" / name for name in ("test_gram.py", "test_guard.py")]  # interpreted
COMPILING = ("compiled", "dynamic")  # laws
EXAMPLES = 8  # of each law; the tests draw 20
BUDGET = 30.0  # seconds of tests for one mutant, as they take without a fault and traced
PATIENCE = 5  # a test hangs if it takes so many times as long as traced, and 2 s
MEMORY = 4 << 30  # bytes that a mutant may take beyond what the process has


Line = tuple[str, int]  # of a module


class Test(NamedTuple):
    """A test, as it is without a fault."""

    seconds: float
    kind: str  # its law or operation; else its own
    reach: frozenset[Line]  # the lines of the package that it runs


class Watch:
    """A pytest plugin: times every test and notes the lines of the package that it runs."""

    def __init__(self) -> None:
        self.tests: dict[str, Test] = {}
        self.failed: list[str] = []
        self.lines: set[Line] = set()
        self.on_import: frozenset[Line] = frozenset()
        self.notes: dict[str, Any] = {}  # by file; None outside the package
        sys.settrace(self.trace)

    def trace(self, frame: Any, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if name not in self.notes:
            path = Path(name)
            inside = path.is_relative_to(PACKAGE)
            self.notes[name] = self.note(module_of(path)) if inside else None
        return self.notes[name]

    def note(self, module: str) -> Any:
        """The function that notes lines of ``module``."""
        add = self.lines.add

        def note(frame: Any, event: str, argument: Any) -> Any:
            if event == "line":
                add((module, frame.f_lineno))
            return note

        return note

    @pytest.hookimpl
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """All but the laws of compiling, which take seconds and have little to do with mutants."""
        sys.settrace(None)
        self.on_import = frozenset(self.lines)
        items[:] = [
            item for item in items if not item.nodeid.partition("[")[2].startswith(COMPILING)
        ]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: Any) -> Iterator[None]:
        sys.modules["structured._core.defaults"].forget()  # what is remembered is not reached
        self.lines.clear()
        start = time.process_time()
        sys.settrace(self.trace)
        yield
        sys.settrace(None)
        seconds = time.process_time() - start
        given = item.callspec.params if hasattr(item, "callspec") else {}
        shared = given.get("law") or given.get("operation")
        kind = f"{item.originalname} {shared}" if shared else item.nodeid
        self.tests[item.nodeid] = Test(seconds, kind, frozenset(self.lines))

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


class Run:
    """A pytest plugin: runs the chosen tests in order, notes which failed, and ends what hangs."""

    def __init__(self, chosen: Sequence[str], seconds: Sequence[float]) -> None:
        self.order = {name: place for place, name in enumerate(chosen)}
        self.seconds = seconds
        self.failed = ""

    @pytest.hookimpl
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        kept = [item for item in items if item.nodeid in self.order]
        items[:] = sorted(kept, key=lambda item: self.order[item.nodeid])

    @pytest.hookimpl
    def pytest_runtest_logstart(self, nodeid: str) -> None:
        usual = self.seconds[self.order[nodeid]]
        signal.setitimer(signal.ITIMER_PROF, 2 + PATIENCE * usual)

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed = report.nodeid


def watch() -> Watch:
    """Run every test without a fault, in this process."""
    watching = Watch()
    _pytest(watching, [*map(str, FILES)])
    return watching


def choose(mutant: Mutant, tests: dict[str, Test], on_import: frozenset[Line]) -> list[str]:
    """The tests that reach the mutant's lines, the quickest of each kind first."""
    lines = {(mutant.module, line) for line in mutant.lines}
    reach = {name for name, test in tests.items() if lines & test.reach}
    if lines & on_import:  # which is seen by any
        reach = set(tests)
    if mutant.module != "interop":  # the tests of linear_operator: many, of the same few products
        reach = {name for name in reach if "test_linear_operator" not in name}
    rounds: collections.Counter[str] = collections.Counter()
    keyed = []
    for name in sorted(reach, key=lambda name: tests[name].seconds):
        keyed.append((rounds[tests[name].kind], tests[name].seconds, name))
        rounds[tests[name].kind] += 1
    total, chosen = 0.0, []
    for _, seconds, name in sorted(keyed):
        total += seconds
        if total <= BUDGET:
            chosen.append(name)
    return chosen


def failing(mutant: Mutant, chosen: Sequence[str], tests: dict[str, Test]) -> str:
    """The first of the chosen tests that fails with the mutant, in this process; "" if none."""
    limit = _size() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.setitimer(signal.ITIMER_PROF, 20)  # to import it
    sys.meta_path.insert(0, Import(mutant))
    run = Run(chosen, [tests[name].seconds for name in chosen])
    root = PACKAGE.parent
    files = {str(root / name.split("::")[0]): None for name in chosen}
    status = _pytest(run, list(files))
    return run.failed or ("" if status in (0, 5) else "import")


def warm() -> None:
    """Import and run once what every child needs, then forget the package itself."""
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # Hypothesis has its own
    os.environ["LAWS_EXAMPLES"] = str(EXAMPLES)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # kernels are interpreted
    import tests.conftest  # noqa: F401, I001  # before Triton: one thread, no chance, no GPU
    import linear_operator
    import linear_operator.test.linear_operator_test_case  # noqa: F401
    import scipy.fft
    import scipy.linalg
    import scipy.sparse.linalg  # noqa: F401
    import torch._dynamo  # noqa: F401
    import triton.language  # noqa: F401

    from structured.testing import LAWS, check

    check("circulant", laws=[law for law in LAWS if law not in COMPILING], examples=5)
    sys.modules["structured.kernels"]._LIBRARY._destroy()  # a second import defines it again
    for name in [m for m in sys.modules if m.split(".")[0] == "structured"]:
        del sys.modules[name]
    gc.collect()
    gc.freeze()  # or every child goes through all that is imported, thrice


def _pytest(plugin: Any, files: Sequence[str]) -> int:
    options = ["-q", "--assert=plain", "-p", "no:cacheprovider", f"--rootdir={PACKAGE.parent}"]
    quick = ["-x"] if isinstance(plugin, Run) else []
    return int(pytest.main([*options, *quick, *files], plugins=[plugin]))


def _size() -> int:
    """Bytes of address space that this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()
