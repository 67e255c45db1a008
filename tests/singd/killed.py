"""A training process that resumes from its checkpoint, and may be killed: see test_killed.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from docs import snippets
from tests.singd.paper import SINGD
from tests.singd.runs import batches, mean_loss, raw_bytes, snapshot

STEPS = 120
PAGE = Path(__file__).parents[2] / "docs" / "singd" / "checkpoints.md"
save = snippets.run(PAGE, "def save(")["save"]


def make() -> tuple[nn.Module, SINGD]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.2), nn.Tanh(), nn.LayerNorm(64))
    model.append(nn.Linear(64, 3)).to(torch.bfloat16)
    dtypes = (torch.float32, None)
    return model, SINGD(model, T=3, alpha1=0.5, lr=0.05, preconditioner_dtype=dtypes)


def train(folder: str, said: Any = None) -> dict[str, bytes]:
    """All steps, from the checkpoint if there is one; ``said`` is released where a save begins."""
    torch.set_num_threads(1)
    model, optimizer = make()
    path, first = Path(folder, "run.pt"), 0
    if path.exists():
        saved = torch.load(path)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])
        first = saved["step"]
    for step, (X, y) in enumerate(batches(STEPS, dtype=torch.bfloat16)):
        if step < first:
            continue
        optimizer.zero_grad()
        mean_loss(model(X), y).backward()
        optimizer.step()
        if said is not None:
            said.release()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save(state | {"random": torch.get_rng_state(), "step": step + 1}, str(path))
    return raw_bytes(snapshot(model, optimizer))


def child(folder: str, said: Any) -> None:
    """Train, and leave what it ends with."""
    ended = train(folder, said)
    torch.save(ended, Path(folder, "ended"))
