"""Training ends where it ended before, to the bit; on another processor, nearly there."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.frozen.cases import CASES
from tests.frozen.record import FILE, TOLERANCES, measured, processor

FROZEN: dict[str, Any] = json.loads(FILE.read_text())


def test_every_configuration_is_frozen() -> None:
    assert list(FROZEN["cases"]) == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_training_ends_where_it_did(name: str) -> None:
    now, before = measured(name), FROZEN["cases"][name]
    if processor() == FROZEN["processor"]:
        assert now == before
    else:
        *_, norm = before["sketch"]
        got, expected = (torch.tensor(each["sketch"]) for each in (now, before))
        tolerance = TOLERANCES[CASES[name].precision] * norm
        torch.testing.assert_close(got, expected, rtol=0.0, atol=tolerance)
