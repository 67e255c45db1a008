"""The pages on trained factors run, briefly, and show what they say."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

import singd
import singd.factors

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
SHORTER = {  # a page, what is changed to be brief
    "plot_posterior.py": {"NOISE = [0.0, 0.25, 0.5, 0.75, 1.0]": "NOISE = [0.0, 1.0]"},
    "plot_pruning.py": {
        "0.5, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97]": "0.8, 0.9]",
        "UNITS = [0, 4, 8, 12, 16, 20, 24]": "UNITS = [0, 16]",
    },
    "plot_influence.py": {"150, 15, 40, 20": "60, 6, 20, 8"},
    "plot_merging.py": {"0.0, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 30.0, 100.0]": "0.0, 10.0]"},
}


def run(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    source = (EXAMPLES / name).read_text()
    for old, new in SHORTER[name].items():
        assert source.count(old) == 1
        source = source.replace(old, new)
    mpl.use("Agg")
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
    monkeypatch.syspath_prepend(EXAMPLES)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, name, "exec"), names)
    plt.close("all")
    assert len(shown) == 1
    return names


@pytest.mark.parametrize("name", ["digits.py", *SHORTER])
def test_only_public_names(name: str) -> None:
    public = {"singd": {*singd.__all__}, "singd.factors": {*singd.factors.__all__}}
    for node in ast.walk(ast.parse((EXAMPLES / name).read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "singd":
            assert {n.name for n in node.names} <= public[str(node.module)]
        assert not isinstance(node, ast.Attribute) or not node.attr.startswith("_")


def test_the_posterior_is_calibrated_where_the_network_is_too_sure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured = run("plot_posterior.py", monkeypatch)["measured"]
    for name in ("trained factors", "refitted factors"):
        for which in (0, 1):  # NLL and ECE, at the largest noise
            assert measured[name][-1][which] < 0.9 * measured["MAP"][-1][which]


@pytest.mark.filterwarnings("ignore:.*expected factors with a residual")
def test_the_surgeon_keeps_accuracy_that_others_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    curves = run("plot_pruning.py", monkeypatch)["curves"]
    others = max(curves["magnitude"][-1], curves["diagonal Fisher"][-1])
    for name in ("surgeon, trained factors", "surgeon, refitted", "surgeon, gradually"):
        assert curves[name][-1] > others + 0.15


def test_predicted_changes_follow_those_of_training_again(monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("plot_influence.py", monkeypatch)
    assert names["correlation"] > 0.6
    assert names["found"]["by influence"][names["WRONG"] - 1] >= names["WRONG"] / 2


def test_the_curvature_lets_both_tasks_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("plot_merging.py", monkeypatch)
    both = {name: max(map(sum, path)) for name, path in names["paths"].items()}
    assert both["curvature"] > both["distance"] + 0.04
    assert sum(names["results"]["curvature"]) > sum(names["results"]["mean"])
