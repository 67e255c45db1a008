"""The Trainer of Hugging Face Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from tests.frameworks.data import digits, text
from tests.singd.paper import SINGD
from tests.singd.runs import distance, snapshot

LENGTH = 12
OPTIONS = {"lr": 0.05, "T": 2, "kl_clip": 1e-2, "structures": ("dense", "diagonal")}
OPTIONS["loss_average"] = "batch+sequence"  # of a language model


def gpt(dropout: float = 0.0) -> Any:
    """GPT-2, whose layers are ``Conv1D``, on bytes."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=128,
        n_positions=LENGTH,
        n_embd=16,
        n_layer=1,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )
    return transformers.GPT2LMHeadModel(config)


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=128,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=LENGTH,
        num_labels=4,
    )
    return transformers.BertForSequenceClassification(config)


def vit() -> Any:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=10,
    )
    return transformers.ViTForImageClassification(config)


def lines(count: int) -> list[dict[str, Tensor]]:
    """Pieces of text of different lengths; what is padding has no label."""
    rows = []
    for i, ids in enumerate(text(count, LENGTH)):
        kept = torch.arange(LENGTH) < LENGTH - i % 7
        rows.append(
            {
                "input_ids": ids * kept,
                "attention_mask": kept.long(),
                "labels": ids.masked_fill(~kept, -100),
            }
        )
    return rows


def pieces(count: int) -> list[dict[str, Tensor]]:
    """Pieces of text, each with the quarter of the alphabet where its first letter is."""
    return [{"input_ids": ids, "labels": ids[0] // 32} for ids in text(count, LENGTH)]


def images(count: int) -> list[dict[str, Tensor]]:
    X, y = digits()
    return [
        {"pixel_values": x.view(1, 8, 8), "labels": t}
        for x, t in zip(X[:count], y[:count], strict=True)
    ]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    options = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "save_strategy": "no",
        **options,
    }
    return TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1000, **options
    )


class Recording(Trainer):
    """A Trainer that remembers what it trained on."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen: list[tuple[list[dict[str, Tensor]], Any]] = []

    def get_batch_samples(self, *given: Any) -> Any:
        self.seen.append(super().get_batch_samples(*given))
        return self.seen[-1]


HOOKS: dict[str, Any] = {
    "optimizers": lambda m: {"optimizers": (SINGD(m, **OPTIONS), None)},
    "optimizer_cls_and_kwargs": lambda m: {
        "optimizer_cls_and_kwargs": (SINGD, {"model": m, **OPTIONS})
    },
    "a factory": lambda m: {"optimizer_cls_and_kwargs": (lambda: SINGD, dict(OPTIONS))},
}


@pytest.mark.parametrize("hook", HOOKS)
def test_the_trainer_is_the_loop(hook: str, tmp_path: Path) -> None:
    model = gpt()
    trainer = Recording(
        model=model, args=arguments(tmp_path), train_dataset=lines(48), **HOOKS[hook](model)
    )
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, SINGD)
    by_hand = gpt().train()
    ours = SINGD(by_hand, **OPTIONS)
    schedule = transformers.get_scheduler("linear", ours, 0, 6)
    for batches, terms in trainer.seen:
        for batch in batches:
            by_hand(**batch, num_items_in_batch=terms).loss.backward()
        nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
        ours.step()
        schedule.step()
        by_hand.zero_grad()
    assert len(trainer.seen) == 6
    assert distance(snapshot(model, optimizer), snapshot(by_hand, ours)) == 0.0


def test_a_checkpoint_resumes_bit_for_bit(tmp_path: Path) -> None:
    def trainer(**options: Any) -> Trainer:
        model = gpt(dropout=0.1)
        hook = (SINGD, {"model": model, **OPTIONS})
        args = arguments(tmp_path, **options)
        data = lines(32)  # two epochs
        return Trainer(model=model, args=args, train_dataset=data, optimizer_cls_and_kwargs=hook)

    whole = trainer(save_strategy="steps", save_steps=3)
    whole.train()
    AcceleratorState._reset_state(reset_partial_state=True)
    rest = trainer()
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert rest.state.global_step == whole.state.global_step == 6
    got = snapshot(rest.model, rest.optimizer.optimizer)
    assert distance(got, snapshot(whole.model, whole.optimizer.optimizer)) == 0.0


class Counting(Recording):
    """The recipe: the Trainer knows how many terms the loss of a step is a mean over."""

    def get_batch_samples(self, *given: Any) -> Any:
        batches, terms = super().get_batch_samples(*given)
        self.optimizer.optimizer.count_terms(terms / self.accelerator.num_processes)
        return batches, terms


@pytest.mark.parametrize("counted", [True, False])
def test_terms_are_the_tokens_that_are_not_padding(counted: bool, tmp_path: Path) -> None:
    model = gpt().double()
    layer = model.transformer.h[0].mlp.c_fc
    inputs, grads = [], []

    def watch(_: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            inputs.append(args[0].detach().flatten(0, -2))
            output.register_hook(lambda g: grads.append(g.flatten(0, -2)))

    layer.register_forward_hook(watch)
    # One step of IKFAC from the identity: K = I - b / 2 (S_K + lam I - I).
    options = {"T": 1, "lr_cov": 1e-3, "damping": 0.1, "kfac_like": True, "factor_clip": None}
    if not counted:
        options["loss_average"] = "batch+sequence"
    trainer = (Counting if counted else Recording)(
        model=model,
        args=arguments(tmp_path, max_steps=1, max_grad_norm=0.1, weight_decay=0.0),
        train_dataset=lines(8),
        optimizer_cls_and_kwargs=(SINGD, {"model": model, **options}),
    )
    trainer.train()
    A, B = torch.cat(inputs), torch.cat(grads)
    [(_, terms)] = trainer.seen
    rows = 8 * LENGTH
    assert A.shape == (rows, 16)
    assert rows / 2 < terms < 0.8 * rows
    state = trainer.optimizer.optimizer.state[layer.weight]
    A = nn.functional.pad(A, (0, 1), value=1.0)
    S_K, S_C = (
        2 / 1e-3 * (I - state[side][0]) + 0.9 * I
        for side, I in (("K", torch.eye(17).double()), ("C", torch.eye(64).double()))
    )
    torch.testing.assert_close(S_K, A.mT @ A / rows, rtol=1e-6, atol=1e-10)
    true = float(terms) if counted else rows  # every position counts unless we are told better
    torch.testing.assert_close(S_C, true * B.mT @ B, rtol=1e-6, atol=1e-10)


MODELS = {"GPT-2": (gpt, lines), "BERT": (bert, pieces), "ViT": (vit, images)}


@pytest.mark.parametrize("name", MODELS)
def test_models_learn(name: str, tmp_path: Path) -> None:
    make, data = MODELS[name]
    model = make()
    average = "batch+sequence" if name == "GPT-2" else "batch"
    optimizer = SINGD(model, lr=0.1, T=2, kl_clip=1e-4, loss_average=average, adamw={"lr": 1e-2})
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    weights += [m.weight for m in model.modules() if type(m).__name__ == "Conv1D"]
    embedding = model.get_input_embeddings()
    tied = getattr(embedding, "weight", None)
    rules = {row.parameter: row.rule for row in optimizer.plan().rows}
    names = {id(p): n for n, p in model.named_parameters()}
    assert {rules[names[id(w)]] for w in weights if w is not tied} == {"SINGD"}
    batch = transformers.default_data_collator(data(64))

    def loss() -> float:
        with torch.no_grad():
            return float(model.eval()(**batch).loss)

    before = loss()
    args = arguments(
        tmp_path,
        max_steps=40,
        per_device_train_batch_size=32,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
    )
    trainer = Trainer(model=model, args=args, train_dataset=data(64), optimizers=(optimizer, None))
    trainer.train()
    assert loss() < 0.6 * before
    assert optimizer.skipped == 0
    assert all("K" in optimizer.state[w] for w in weights if w is not tied)
