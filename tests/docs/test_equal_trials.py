"""What the README says of the comparison with equal trials."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from docs import equal_trials


@pytest.mark.parametrize(
    ("lower", "said"),
    [
        ({"SOAP": 4, "Muon": 0, "KFAC": 1}, "of 6 tasks: SOAP on 4 and KFAC on 1."),
        ({"SOAP": 1, "Muon": 2, "KFAC": 3}, "of 6 tasks: SOAP on 1, Muon on 2 and KFAC on 3."),
        ({"Muon": 2}, "of 6 tasks: Muon on 2."),
        ({"SOAP": 0}, "Of 6 tasks with equal trials, SOAP, Muon, KFAC are ahead on none."),
    ],
)
def test_others_are_named_where_they_are_ahead(
    lower: dict[str, int], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({"tasks": 6, "lower than SINGD when tuned": lower}))
    assert equal_trials.others(path).endswith(said)
