"""Lightning calls ``step`` with a closure that resets gradients and runs the pass."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from tests.frameworks.data import Batch, by_hand, classifier, loader
from tests.singd.paper import SINGD
from tests.singd.runs import distance, snapshot

pytestmark = [
    # Lightning speaks of the number of workers, and uses what PyTorch has deprecated.
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*treespec.*:FutureWarning"),
]


class Classifier(lightning.LightningModule):
    def __init__(self, schedule: bool = False) -> None:
        super().__init__()
        self.net, self.schedule = classifier(), schedule

    def training_step(self, batch: Batch, index: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = made(self.net)
        if not self.schedule:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": halving(optimizer), "interval": "step"},
        }


def made(net: nn.Module) -> SINGD:
    return SINGD(net, lr=0.05, T=2, kl_clip=1e-2, structures=("dense", "diagonal"))


def halving(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


def trainer(folder: Path, **options: Any) -> lightning.Trainer:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    options = {"max_epochs": 1, "enable_checkpointing": False, **options}
    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


def fitted(module: lightning.LightningModule, folder: Path, **options: Any) -> dict[str, Tensor]:
    run = trainer(folder, **options)
    run.fit(module, loader(8))
    return snapshot(module.net, run.optimizers[0])


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "clipping": ({"gradient_clip_val": 0.3}, {"clip": 0.3}),
    "accumulation": ({"accumulate_grad_batches": 2}, {"micro": 2}),
    "bfloat16": ({"precision": "bf16-mixed"}, {"dtype": torch.bfloat16}),
    "all of them": (
        {"precision": "bf16-mixed", "gradient_clip_val": 0.3, "accumulate_grad_batches": 2},
        {"dtype": torch.bfloat16, "clip": 0.3, "micro": 2},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_automatic_optimization_is_the_loop(case: str, tmp_path: Path) -> None:
    theirs, ours = CASES[case]
    net = classifier()
    expected = by_hand(net, made(net), list(loader(8)), by_group=True, **ours)
    assert distance(fitted(Classifier(), tmp_path, **theirs), expected) == 0.0


def test_a_scheduler_is_followed(tmp_path: Path) -> None:
    net = classifier()
    optimizer = made(net)
    expected = by_hand(net, optimizer, list(loader(8)), scheduler=halving(optimizer))
    assert distance(fitted(Classifier(schedule=True), tmp_path), expected) == 0.0


@pytest.mark.parametrize("clip", [None, 0.3])
def test_float16_with_a_gradient_scaler(clip: float | None, tmp_path: Path) -> None:
    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=2)  # overflows

    net = classifier()
    optimizer = made(net)
    by_loop = scaler()
    expected = by_hand(
        net,
        optimizer,
        list(loader(8)),
        dtype=torch.float16,
        clip=clip,
        by_group=True,
        scaler=by_loop,
    )
    assert 2.0**16 < by_loop.get_scale() < 2.0**24
    plugin = MixedPrecision("16-mixed", "cpu", scaler())
    got = fitted(Classifier(), tmp_path, plugins=[plugin], gradient_clip_val=clip)
    assert distance(got, expected) == 0.0


def test_a_checkpoint_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = fitted(Classifier(schedule=True), tmp_path, max_epochs=2)
    first = trainer(tmp_path)
    first.fit(Classifier(schedule=True), loader(8))
    first.save_checkpoint(tmp_path / "half.ckpt")
    second, module = trainer(tmp_path, max_epochs=2), Classifier(schedule=True)
    second.fit(module, loader(8), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert distance(snapshot(module.net, second.optimizers[0]), whole) == 0.0


class Counting(Classifier):
    """A mean over every other sample, which the wrapper of the optimizer is told."""

    def training_step(self, batch: Batch, index: int) -> Tensor:
        X, y = batch
        self.optimizers().count_terms(len(y[::2]))
        with self.optimizers().paused():
            self.net(X)
        return nn.functional.cross_entropy(self.net(X)[::2], y[::2])


def test_the_wrapped_optimizer_counts_and_pauses(tmp_path: Path) -> None:
    net = classifier()
    optimizer = made(net)
    for X, y in loader(8):
        optimizer.count_terms(len(y[::2]))
        nn.functional.cross_entropy(net(X)[::2], y[::2]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert distance(fitted(Counting(), tmp_path), snapshot(net, optimizer)) == 0.0


class Manual(Classifier):
    """The user's own loop, with the wrapped optimizer: a pass whose gradients are dropped first."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Batch, index: int) -> None:
        optimizer: Any = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            optimizer.count_terms(16)
            self.manual_backward(super().training_step(batch, index))
        optimizer.step()


def test_manual_optimization(tmp_path: Path) -> None:
    net = classifier()
    expected = by_hand(net, made(net), list(loader(8)))
    assert distance(fitted(Manual(), tmp_path), expected) == 0.0
