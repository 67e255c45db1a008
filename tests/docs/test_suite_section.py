"""The section on the suite: which rate counts, the order of tasks, and what is said of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from docs import suite

HEAD = "task,part,method,options,seed,steps,batch,test loss,seconds,state bytes"


@pytest.fixture
def results(tmp_path: Path) -> list[suite.Result]:
    """Two held-out tasks, one of which diverged with one seed, and one for development."""
    rows = [
        *("A,held out,adamw,lr=1,0,9,1,4.0,1,200", "A,held out,adamw,lr=2,0,9,1,2.0,1,200"),
        *("A,held out,singd,,0,9,1,1.0,1,240", "A,held out,singd,lr=5,0,9,1,0.1,1,240"),
        *("B,held out,adamw,lr=1,0,9,1,2.0,1,200", "B,held out,singd,,0,9,1,3.0,1,100"),
        *("B,held out,adamw,lr=1,1,9,1,2.0,1,200", "B,held out,singd,,1,9,1,5.0,1,100"),
        "B,held out,singd,,2,9,1,99.0,1,100",  # a seed that AdamW has not
        *("C,development,adamw,lr=1,0,9,1,1.0,1,200", "C,development,singd,,0,9,1,nan,,"),
        *("D,held out,singd,,0,9,1,1.0,1,100", "E,held out,adamw,lr=1,0,9,1,1.0,1,100"),
        "A,held out,soap,lr=3,0,9,1,0.5,1,900",
    ]
    path = tmp_path / "suite.csv"
    path.write_text("\n".join([HEAD, *rows]) + "\n")
    return suite.read(path)


def test_other_options_are_lines_of_their_own(results: list[suite.Result], tmp_path: Path) -> None:
    path = tmp_path / "suite.csv"
    path.write_text(path.read_text() + "C,development,singd,lr=5,0,9,1,0.25,1,240\n")
    assert suite.variants(path).splitlines()[2:] == [
        "| none | 0 of 1 | inf | inf (C) |",
        "| `lr=5` | 1 of 1 | 0.250 | 0.25 (C) |",
    ]
    assert [(r.task, r.ratio) for r in suite.read(path, "lr=5")] == [("C", 0.25), ("A", 0.05)]


def test_the_worst_comes_first_and_rates_are_the_best(results: list[suite.Result]) -> None:
    assert [(r.task, r.rate, r.ratio) for r in results] == [
        ("C", "1", math.inf),
        ("B", "1", 2.0),
        ("A", "2", 0.5),
    ]
    assert [r.bytes for r in results[1:]] == [0.5, 1.2]
    assert results[1].error == 0.5  # of 1.5 and 2.5
    assert math.isnan(results[2].error)


def test_what_is_said(results: list[suite.Result]) -> None:
    text = suite.evidence(results)
    assert (
        "**Held out**, 2 tasks: AdamW is ahead on 1: B (2.000 ± 0.500); the median ratio is 1.250."
        in text
    )
    assert "**Development**, 1 tasks: AdamW is ahead on 1: C (inf)" in text
    assert "| A | 0.500 | 1 | 2 | 2 | 1.20 |" in text
    assert text.index("| B |") < text.index("| A |") < text.index("| C |")
    assert suite.wins(results) == "1 of 3"
    assert suite.worst(results[1:]) == "The worst is B, where the test loss is 2.00 times AdamW's."
    assert "ahead on none" in suite.evidence(results[2:])
    assert suite.worst(results[2:]) == "On no task is AdamW ahead."


def test_without_results() -> None:
    assert "not been run yet" in suite.evidence([])


def test_options_beside_the_default(results: list[suite.Result], tmp_path: Path) -> None:
    path = tmp_path / "suite.csv"
    path.write_text(path.read_text() + 'B,held out,singd,"lr=5,T=2",0,9,1,0.25,1,240\n')
    lines = suite.beside("lr=5,T=2", path=path).splitlines()
    assert lines[0] == "| task | default | `lr=5, T=2` |"
    assert [line for line in lines if line.startswith(("| A", "| B", "| C"))] == [
        "| B | 2.000 ± 0.500 | 0.125 |"
    ]
