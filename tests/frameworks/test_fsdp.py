"""Sharded models: the optimizer needs whole weights, and says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

from tests.frameworks.data import by_hand, classifier, loader
from tests.singd.paper import SINGD


@pytest.fixture(autouse=True)
def _one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


MESSAGE = r"0.weight: expected a whole parameter on every rank, .* use DistributedDataParallel"


def test_fully_shard_is_refused() -> None:
    model = classifier()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    assert isinstance(model[0].weight, DTensor)
    with pytest.raises(ValueError, match=MESSAGE):
        SINGD(model)


def test_fully_shard_afterwards_is_noticed() -> None:
    model = classifier()
    optimizer = SINGD(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"weight was replaced after the optimizer was made"):
        by_hand(model, optimizer, list(loader(1)))


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")  # there is one rank
@pytest.mark.filterwarnings("ignore:.*FullyShardedDataParallel:FutureWarning")  # it is the older
@pytest.mark.parametrize("original", [False, True])
def test_the_older_wrapper_is_refused(original: bool) -> None:
    model = FullyShardedDataParallel(
        classifier(), use_orig_params=original, device_id=torch.device("cpu")
    )
    with pytest.raises(ValueError, match="expected a whole parameter"):
        SINGD(model)
