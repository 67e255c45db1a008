"""What the README says of the comparisons with equal trials."""

from __future__ import annotations

from typing import Any

import pytest

from docs import equal_trials


@pytest.mark.parametrize(
    ("lower", "says"),
    [
        ({"SOAP": 3, "Muon": 2, "KFAC": 1, "AdamW": 5}, "SOAP on 3, Muon on 2 and KFAC on 1"),
        ({"SOAP": 3, "Muon": 0}, "SOAP on 3"),
        ({"KFAC": 1, "Muon": 2}, "Muon on 2 and KFAC on 1"),
        ({"SOAP": 0}, "none of SOAP, Muon, KFAC"),
    ],
)
def test_those_ahead_are_named_with_their_tasks(lower: dict[str, int], says: str) -> None:
    assert equal_trials.ahead({"lower than SINGD when tuned": lower}) == says


def test_the_worst_task_is_said_as_it_is_in_the_summary() -> None:
    short: dict[str, Any] = {"lower than SINGD when tuned": {"SOAP": 5}}
    worst = {"worst with nothing searched": ["a task", 2.951], "tasks": 6}
    said = equal_trials.others(short, short | worst)
    assert "it is the a task, 3.0 times" in said
    assert said.endswith("SOAP on 5. In runs of a twentieth: SOAP on 5.")
