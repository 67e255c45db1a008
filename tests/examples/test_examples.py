"""The examples run, and know only the public names of both packages."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

import singd
import structured
from singd import update

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
PUBLIC = {
    "structured": {*structured.__all__},
    "singd": {*singd.__all__},
    "singd.update": {name for name, f in vars(update).items() if inspect.isfunction(f)},
}
SECOND_METHODS = ["shampoo.py", "plot_shampoo.py", "plot_gaussian.py"]


def faults(source: str) -> list[str]:
    """Everything in ``source`` that is not public."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.ImportFrom(module=str(module), names=names) if module in PUBLIC:
                found += [n.name for n in names if n.name not in PUBLIC[module]]
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in PUBLIC:
                found.append(module)
            case ast.Import(names=names):
                found += [n.name for n in names if n.name.split(".")[0] in ("structured", "singd")]
            case ast.Attribute(attr=attr) if attr.startswith("_") and not attr.endswith("__"):
                found.append(attr)
    return found


@pytest.mark.parametrize("name", SECOND_METHODS)
def test_only_public_names(name: str) -> None:
    source = (EXAMPLES / name).read_text()
    assert faults(source) == []
    assert "from structured import " in source


@pytest.mark.parametrize(
    "source",
    [
        "from structured._core.matrix import trailing",
        "from structured import trailing",
        "from singd.update import trace",
        "from singd import Capture",
        "from singd.capture.capture import Capture",
        "import structured._core.defaults",
        "K._build([])",
    ],
)
def test_private_names_are_found(source: str) -> None:
    assert faults(source)


def test_shampoo_script_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one epoch of two seeds."""
    source = (EXAMPLES / "plot_shampoo.py").read_text()
    line = "EPOCHS, BATCH, SEEDS = 8, 64, 3\n"
    assert source.count(line) == 1
    mpl.use("Agg")
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
    monkeypatch.syspath_prepend(EXAMPLES)
    names = {"__name__": "__main__"}
    exec(
        compile(source.replace(line, "EPOCHS, BATCH, SEEDS = 1, 64, 2\n"), "plot_shampoo", "exec"),
        names,
    )
    assert len(shown) == 1
    assert all(losses.isfinite().all() for losses in names["curves"].values())
    plt.close("all")
