"""Several processes that share the data do what one process does with all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from singd.testing.sharded.world import spawn_within
from tests.singd.ranks import alone, later, worker
from tests.singd.runs import distance

Runs = dict[int, list[dict[str, dict[str, Tensor]]]]

CASES: dict[str, dict[str, Any]] = {
    f"{name}, {'wrapped' if wrapped else 'bare'}": {"wrapped": wrapped, "method": "SINGD", **case}
    for wrapped in (False, True)
    for name, case in {
        "uneven batches": {},
        "KFAC": {"method": "KFAC"},
        "Toeplitz": {"options": {"structures": ("lower_toeplitz", "diagonal")}},
        "micro-batches": {"micro": 2},
        "a bad batch on one rank": {"bad": 2},
        "a bad batch that is known later": {"bad": 2, "gpu": True},
        "a summed loss": {"options": {"loss_average": None}},
        "counted terms": {"count": True, "options": {"loss_average": None}},
        "a use one rank does not have": {"net": "odd"},
        "a branch one rank throws away": {"net": "called"},
    }.items()
} | {
    f"{name}, wrapped": {"wrapped": True, "method": "SINGD", "micro": 3, **case}
    for name, case in {
        "after the optimizer was made": {"wrapped_after": True},
        "gradients are views of buckets": {"ddp": {"gradient_as_bucket_view": True}},
    }.items()
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What every rank ends with, for 2 and 4 ranks."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    spawn_within(480, worker, (str(folder), CASES), 4)
    return {
        ranks: [torch.load(folder / f"{rank} of {ranks}") for rank in range(ranks)]
        for ranks in (2, 4)
    }


@pytest.mark.filterwarnings("ignore:.* AdamW trains it instead")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_do_what_one_process_does(ranks: int, case: str, runs: Runs) -> None:
    with later(CASES[case]):
        expected = alone(CASES[case], ranks)
    assert int(expected["skipped"]) == ("bad" in CASES[case])
    ended = [run[case] for run in runs[ranks]]
    for other in ended:
        assert distance(other, ended[0]) == 0.0
    assert distance(ended[0], expected) < 1e-11
