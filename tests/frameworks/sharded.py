"""FSDP2 by accelerate and by Lightning, on one of two ranks: see test_sharded.py."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.utils.data import DataLoader

from singd.ops.dtensor import is_distributed, whole
from tests.frameworks.data import by_hand, classifier, loader
from tests.singd.paper import SINGD

BATCHES, OPTIONS = 8, {"lr": 0.05, "T": 2, "structures": ("dense", "diagonal")}
Weights = dict[str, Tensor]


def weights(model: nn.Module) -> Weights:
    """Whole."""
    return {name: whole(p).detach().clone() for name, p in model.named_parameters()}


def alone() -> Weights:
    """One process with the batches of both ranks."""
    model = classifier()
    by_hand(model, SINGD(model, **OPTIONS), list(loader(BATCHES // 2, 32)))
    return weights(model)


def share(rank: int) -> DataLoader[Any]:
    """What one of two ranks sees: every batch's first or second half."""
    whole_batches = list(loader(BATCHES, 16))
    return DataLoader(whole_batches[rank::2], batch_size=None)


def accelerated(rank: int, folder: str) -> Weights:
    """The model is prepared beside a placeholder, and the optimizer made of what comes out."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Linear"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    for state in (AcceleratorState, PartialState):  # which know of no FSDP on a CPU
        state._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    assert accelerator.is_fsdp2

    def made() -> tuple[Any, Any]:
        model = classifier()
        placeholder = torch.optim.SGD(model.parameters(), lr=0.0)
        model, _ = accelerator.prepare(model, placeholder)
        return model, accelerator.prepare_optimizer(SINGD(model, **OPTIONS))

    def train(model: nn.Module, optimizer: Any, batches: Any) -> None:
        for X, y in batches:
            accelerator.backward(nn.functional.cross_entropy(model(X), y))
            accelerator.clip_grad_norm_(model.parameters(), 1e9)
            optimizer.step()
            optimizer.zero_grad()

    batches = list(share(rank))
    model, optimizer = made()
    train(model, optimizer, batches[:2])
    state, entries = get_state_dict(model, optimizer.optimizer)
    dcp.save({"model": state, "optimizer": entries}, checkpoint_id=f"{folder}/accelerated")
    accelerator.free_memory()
    model, optimizer = made()
    state, entries = get_state_dict(model, optimizer.optimizer)
    dcp.load({"model": state, "optimizer": entries}, checkpoint_id=f"{folder}/accelerated")
    set_state_dict(model, optimizer.optimizer, model_state_dict=state, optim_state_dict=entries)
    train(model, optimizer, batches[2:])
    assert all(map(is_distributed, model.parameters()))
    return weights(model)


def lightnings(rank: int, folder: str) -> Weights:
    """``ModelParallelStrategy``, with a checkpoint half the way."""
    import lightning
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Net(lightning.LightningModule):
        def configure_model(self) -> None:
            if not hasattr(self, "net"):
                self.net, mesh = classifier(), self.device_mesh["data_parallel"]
                for layer in self.net:
                    if any(True for _ in layer.parameters()):
                        fully_shard(layer, mesh=mesh)
                fully_shard(self.net, mesh=mesh)

        def training_step(self, batch: Any, _: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return SINGD(self.net, **OPTIONS)

    def trainer(epochs: int) -> lightning.Trainer:
        strategy = ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"
        )
        return lightning.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=strategy,
            max_epochs=epochs,
            use_distributed_sampler=False,
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    first, batches = trainer(1), list(share(rank))
    first.fit(Net(), DataLoader(batches[:2], batch_size=None))
    first.save_checkpoint(f"{folder}/lightning")
    model = Net()
    rest = DataLoader(batches[2:], batch_size=None)
    trainer(2).fit(model, rest, ckpt_path=f"{folder}/lightning")
    assert all(map(is_distributed, model.parameters()))
    return weights(model.net)


def worker(rank: int, ranks: int, folder: str, port: str) -> None:
    """Both, one after the other, with the environment that ``torchrun`` sets."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "NODE_RANK": "0", "GROUP_RANK": "0"}
    os.environ |= {"WORLD_SIZE": f"{ranks}", "LOCAL_WORLD_SIZE": f"{ranks}"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    ended = {f.__name__: f(rank, folder) for f in (accelerated, lightnings)}
    torch.save(ended, Path(folder, f"{rank}"))
    dist.barrier()
    os._exit(0)
