"""peft: LoRA adapters beside frozen layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from tests.frameworks.data import text
from tests.frameworks.test_transformers import bert, gpt
from tests.singd.paper import SINGD

# peft asks Transformers for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

CASES: dict[str, Any] = {
    "Conv1D": (gpt, ["c_attn", "c_fc", "c_proj"], {"task_type": "CAUSAL_LM"}),
    "Linear": (bert, ["query", "value", "dense"], {"task_type": "SEQ_CLS"}),
}


def batch(name: str) -> dict[str, Tensor]:
    ids = text(16, 12)
    return {"input_ids": ids, "labels": ids if name == "Conv1D" else ids[:, 0] // 32}


def adapted(name: str) -> Any:
    make, targets, options = CASES[name]
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=name == "Conv1D", **options
    )
    return get_peft_model(make(), config)


@pytest.mark.parametrize("name", CASES)
def test_adapters_are_trained_and_nothing_else(name: str, tmp_path: Path) -> None:
    model, data = adapted(name), batch(name)
    average = "batch+sequence" if name == "Conv1D" else "batch"
    optimizer = SINGD(model, lr=0.1, T=2, kl_clip=1e-3, loss_average=average)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    rules = {row.parameter: row.rule for row in optimizer.plan().rows}
    assert all(rule == "SINGD" for n, rule in rules.items() if ".lora_" in n)
    assert all(rules[n] == "frozen" for n in frozen)
    assert sum(".lora_" in n for n in rules) >= 8
    before = float(model.eval()(**data).loss.detach())
    model.train()
    for _ in range(30):
        optimizer.zero_grad()
        model(**data).loss.backward()
        optimizer.step()
    after = model.eval()(**data)
    assert float(after.loss.detach()) < 0.99 * before  # what is frozen is random
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)

    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(CASES[name][0](), str(tmp_path)).eval()
    assert torch.equal(loaded(**data).logits, after.logits)
    with optimizer:
        merged = model.merge_and_unload()
    assert type(merged) is type(CASES[name][0]())
    torch.testing.assert_close(merged(**data).logits, after.logits, rtol=1e-4, atol=1e-4)
    hooks = [m._forward_hooks for m in merged.modules() if m._forward_hooks]
    assert hooks == []


def test_the_state_is_loaded_into_a_fresh_adapter() -> None:
    runs = []
    for resumed in (False, True):
        torch.manual_seed(1)
        model = adapted("Linear").eval()
        optimizer = SINGD(model, lr=0.1, T=2, kl_clip=1e-2)
        for step in range(4):
            if resumed and step == 2:
                saved = [m.state_dict() for m in (model, optimizer)]
                model = adapted("Linear").eval()
                optimizer = SINGD(model)
                for m, state in zip((model, optimizer), saved, strict=True):
                    m.load_state_dict(state)
            optimizer.zero_grad()
            model(**batch("Linear")).loss.backward()
            optimizer.step()
        runs.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(r.values() for r in runs), strict=True))
    assert isinstance(model.base_model.model, transformers.BertForSequenceClassification)
