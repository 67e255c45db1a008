"""Runs the Python of a page: every fence in order, in one namespace."""

from __future__ import annotations

import doctest
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def run(page: Path, containing: str = "") -> dict[str, Any]:
    """Execute the page, or its fences that contain a text, and return its namespace.

    Raises:
        AssertionError: If a ``>>>`` example prints anything else than the page says.
    """
    text = page.read_text()
    module = ModuleType(f"page_{page.stem.replace('-', '_').lower()}")
    sys.modules[module.__name__] = module  # what it defines can be pickled
    namespace = module.__dict__
    for fence in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S):
        line = text[: fence.start(1)].count("\n")
        if containing not in fence[1]:
            continue
        if ">>>" in fence[1]:
            example(fence[1], namespace, page, line)
        else:  # line numbers as in the page
            code = compile("\n" * line + fence[1], str(page), "exec", dont_inherit=True)
            exec(code, namespace)
    return namespace


def example(source: str, namespace: dict[str, Any], page: Path, line: int) -> None:
    test = doctest.DocTestParser().get_doctest(source, {}, page.name, str(page), line)
    test.globs, output = namespace, list[str]()
    doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=output.append, clear_globs=False)
    assert not output, "".join(output)
