"""Which placement a model has, and what is refused."""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel as TorchDataParallel
from torch.nn.parallel import DistributedDataParallel

from singd.ops.dtensor import is_distributed
from singd.placement.base import Placement
from singd.placement.places import check_places
from singd.placement.replicated import DataParallel, OneProcess


def find_placement(
    model: nn.Module, group: Any, data: Any, places: Any = None, wrapper: Any = None
) -> Placement:
    """The placement of a model.

    Args:
        model: Model that is trained.
        group: Process group of the ranks that share the data, of a model that is whole on every
            rank; all ranks if ``None``.
        data: Mesh, or names of its dimensions, over which samples differ, of a model that is
            sharded; ``None`` for all dimensions under FSDP2 alone.
        places: Where factors of a sharded model are worked on: one of
            :data:`~singd.placement.places.PLACES`, or places by patterns of parameter names; the
            cheapest if ``None``.
        wrapper: Module around the model that averages gradients in the backward pass, if any.

    Raises:
        ValueError: If the options do not fit the model, or it is sharded in another way.
    """
    check_places(places)
    _refuse_flat(model)
    if any(map(is_distributed, model.parameters())):
        from singd.placement.mesh import data_groups  # these take time to import
        from singd.placement.sharded import Sharded

        if group is not None:
            raise ValueError(
                "process_group: expected None for a sharded model, whose mesh is known; data names "
                "the dimensions over which samples differ"
            )
        groups = data_groups(model, data)
        return Sharded(model, groups, places, averages_gradients=wrapper is None)
    if data is not None:
        raise ValueError(
            f"data: expected None for a model that is whole on every rank, got {data!r}: use "
            "process_group"
        )
    if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
        return DataParallel([group], wrapper is None, wrapper)
    return OneProcess()


def unwrapped(model: Any) -> tuple[Any, Any]:
    """The model inside wrappers of PyTorch, and that which averages gradients, if there is one."""
    wrapper = None
    while True:
        if isinstance(model, TorchDataParallel | DistributedDataParallel):
            model, wrapper = model.module, model
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # by torch.compile
            model = model._orig_mod
        else:
            return model, wrapper


def _refuse_flat(model: nn.Module) -> None:
    """Raise ``ValueError`` for FSDP1, which puts parameters into flat ones."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(
        isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules()
    ):
        raise ValueError(
            "model: FullyShardedDataParallel puts its parameters into flat ones, which have no "
            "factors: use torch.distributed.fsdp.fully_shard"
        )
