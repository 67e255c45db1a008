"""Runs the Python of a page: every fence in order, in one namespace."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def run(page: Path) -> dict[str, Any]:
    """Execute the page and return its namespace.

    Raises:
        AssertionError: If a ``>>>`` example prints anything else than the page says.
    """
    text = page.read_text()
    namespace: dict[str, Any] = {"__name__": page.stem}
    for fence in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S):
        line = text[: fence.start(1)].count("\n")
        if ">>>" in fence[1]:
            example(fence[1], namespace, page, line)
        else:  # line numbers as in the page
            exec(compile("\n" * line + fence[1], str(page), "exec", dont_inherit=True), namespace)
    return namespace


def example(source: str, namespace: dict[str, Any], page: Path, line: int) -> None:
    test = doctest.DocTestParser().get_doctest(source, {}, page.name, str(page), line)
    test.globs, output = namespace, list[str]()
    doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=output.append, clear_globs=False)
    assert not output, "".join(output)
