"""What ``structured`` imports, and that the examples in its docstrings hold."""

import ast
import doctest
import importlib
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import structured
from tests import imports

PACKAGE = Path(structured.__file__).parent
TREES = imports.trees(structured)
ORDER = ("_products", "kernels", "_core", "_transforms", "", "testing")  # the lowest first


def test_imports_run_one_way():
    assert imports.upward(TREES, ORDER) == []
    assert imports.circle(TREES) == []
    assert imports.hidden(TREES) == []
    assert imports.private(TREES) == []


@pytest.mark.parametrize("name", TREES)
def test_structured_stands_alone(name):
    assert not any(full.split(".")[0] == "singd" for full in imports.imported(TREES[name]))


def test_the_import_adds_little_to_that_of_torch():
    assert imports.loaded_by("structured") == {"structured"}


def test_the_version_is_that_of_the_project(tmp_path):
    """In this checkout, and where the package alone is on the path: then that installed."""
    written = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]["version"]
    assert structured.__version__ == written
    shutil.copytree(PACKAGE, tmp_path / "structured")
    code = "import structured; print(structured.__version__, structured.__file__)"
    for text in ("", "[project]\nname = 'another'\nversion = '7'\n"):
        (tmp_path / "pyproject.toml").write_text(text)
        command = [sys.executable, "-W", "ignore", "-c", code]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [
            metadata.version("structured-singd"),
            f"{tmp_path}/structured/__init__.py",
        ]


def test_what_stands_in_the_way_is_found():
    """Each of the four rules is broken once."""
    sources = {
        "package": "",
        "package._core.a": "from package.b import B",
        "package.b": "def f():\n    from package._core import a",
        "package.c": "from typing import TYPE_CHECKING\nfrom package.b import _hidden",
        "package.d": "class D:\n    def _g(self): ...",
        "package.e": "def f(d):\n    self._g()\n    return d._g",
    }
    trees = {name: ast.parse(text) for name, text in sources.items()}
    assert imports.upward(trees, ("_core", "")) == ["package._core.a imports package.b"]
    assert set(imports.circle(trees)) == {"package._core.a", "package.b"}
    assert imports.hidden(trees) == ["package.c"]
    assert imports.private(trees) == ["package.c reads _hidden", "package.e reads _g"]


@pytest.mark.parametrize("name", TREES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    examples = {
        name
        for name in TREES
        for test in finder.find(importlib.import_module(name))
        if test.examples
    }
    assert {"structured._core.matrix", "structured._core.spec", "structured.testing"} <= examples
