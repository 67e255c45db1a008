"""What ``structured`` may import, and that the examples in its docstrings hold."""

import ast
import doctest
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import structured

MODULES = [module.name for module in pkgutil.walk_packages(structured.__path__, "structured.")]


@pytest.mark.parametrize("name", MODULES)
def test_structured_stands_alone(name):
    path = Path(importlib.import_module(name).__file__)
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in getattr(node, "names", ())]
        names.append(getattr(node, "module", None) or "")
        assert not any(word.split(".")[0] == "singd" for word in names), f"{name} imports singd"


def test_hypothesis_and_the_compiler_are_not_needed():
    code = (
        "import sys, structured; "
        "loaded = {'hypothesis', 'torch._inductor', 'singd'} & sys.modules.keys(); "
        "sys.exit(str(loaded) if loaded else 0)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.parametrize("name", ["structured", *MODULES])
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    examples = {
        name
        for name in MODULES
        for test in finder.find(importlib.import_module(name))
        if test.examples
    }
    assert {"structured._core.matrix", "structured._core.spec", "structured.testing"} <= examples
