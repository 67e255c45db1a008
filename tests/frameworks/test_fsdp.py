"""Sharded models on one rank: what is refused, and with which words."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from tests.frameworks.data import by_hand, classifier, loader
from tests.one_rank import one_rank
from tests.singd.paper import SINGD


@pytest.fixture(scope="module", autouse=True)
def _one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Models may be sharded here, over a mesh of one."""
    with one_rank(tmp_path_factory.mktemp("one")):
        yield


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (1,), mesh_dim_names=("data",))


def test_fully_shard_afterwards_is_noticed() -> None:
    model = classifier()
    optimizer = SINGD(model)
    fully_shard(model, mesh=mesh())
    with pytest.raises(ValueError, match=r"weight was replaced after the optimizer was made"):
        by_hand(model, optimizer, list(loader(1)))


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")  # there is one rank
@pytest.mark.filterwarnings("ignore:.*FullyShardedDataParallel:FutureWarning")  # it is the older
@pytest.mark.parametrize("original", [False, True])
def test_the_older_wrapper_is_refused(original: bool) -> None:
    model = FullyShardedDataParallel(
        classifier(), use_orig_params=original, device_id=torch.device("cpu")
    )
    with pytest.raises(ValueError, match=r"use torch.distributed.fsdp.fully_shard"):
        SINGD(model)


def test_options_of_whole_models_are_refused() -> None:
    model = fully_shard(classifier(), mesh=mesh())
    with pytest.raises(ValueError, match="process_group: expected None for a sharded model"):
        SINGD(model, process_group=dist.group.WORLD)
    with pytest.raises(
        ValueError, match=r"data: expected a mesh or names among \['data'\], got \['tp'\]"
    ):
        SINGD(model, data=["tp"])
    with pytest.raises(ValueError, match="data: expected None for a model that is whole"):
        SINGD(classifier(), data=["data"])


def test_tensor_parallelism_needs_the_dimensions_of_the_data() -> None:
    model = parallelize_module(classifier(), mesh(), {"0": ColwiseParallel()})
    with pytest.raises(ValueError, match=r"0.weight is placed as .*: expected data, the mesh"):
        SINGD(model)


def test_offloaded_parameters_are_refused() -> None:
    class Offloaded(nn.Module):
        """Stands in for a parameter that is computed on a GPU, which is not here."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 2))
            self.weight.device_mesh = mock.Mock(device_type="cuda", ndim=1)
            self.weight.to_local = lambda: self.weight.detach()

    with pytest.raises(ValueError, match=r"weight is kept on cpu and computed on cuda"):
        SINGD(Offloaded())
