"""Language models of the characters of Python's built-in help."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import nets
from benchmarks.suite.language_nets import BERT, LSTM, T5, Llama, MixtureOfExperts, with_adapters
from benchmarks.suite.sampling import LENGTH, held_out_windows, windows
from benchmarks.suite.task import Batch, Task, train
from benchmarks.text import python_topics

WIDTH, BATCH, SPAN = 48, 16, 8
MASK = START = python_topics().vocabulary  # one more token
TOKENS = MASK + 1


def next_character(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy in nats of every character given those before it."""
    (text,) = batch
    return F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def masked_characters(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the characters that were hidden."""
    text, hidden = batch
    return F.cross_entropy(model(text.masked_fill(hidden, MASK))[hidden], text[hidden])


def missing_span(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of a span that was cut out, given both sides and what is written already."""
    text, start = batch
    places = start[:, None] + torch.arange(SPAN)
    span = text.gather(1, places)
    seen = text.scatter(1, places, MASK)
    before = F.pad(span[:, :-1], (1, 0), value=START)
    return F.cross_entropy(model(seen, before).flatten(0, 1), span.flatten())


# Batches -----------------------------------------------------------------------------------------


def plain(text: Tensor, _: torch.Generator) -> Batch:
    return (text,)


def masked(text: Tensor, generator: torch.Generator) -> Batch:
    return text, torch.rand(text.shape, generator=generator) < 0.15


def cut(text: Tensor, generator: torch.Generator) -> Batch:
    return text, torch.randint(text.shape[1] - SPAN, text.shape[:1], generator=generator)


def shouted(text: Tensor, _: torch.Generator) -> Batch:
    """Another language, for adaptation: every character is replaced by a fixed other one."""
    order = torch.randperm(python_topics().vocabulary, generator=torch.Generator().manual_seed(1))
    return (order[text],)


Make = Callable[[Tensor, torch.Generator], Batch]


def batches(make: Make, seed: int, size: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed + 1)
    return (make(text, generator) for text in windows(seed, size))


def held_out(make: Make) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [make(text, generator) for text in held_out_windows()]


# Models ------------------------------------------------------------------------------------------


def gpt() -> nn.Module:
    return nets.GPT(WIDTH, 2, TOKENS, LENGTH)


@cache
def pretrained() -> nn.Module:
    """A GPT that was trained on the text for a while; the same for every run."""
    models = []

    def make(model: nn.Module) -> torch.optim.Optimizer:
        models.append(model)
        return torch.optim.AdamW(model.parameters(), lr=1e-2)

    with torch.random.fork_rng():
        train(TASKS["GPT"], make, seed=1234)
    return models[0]


def task(
    part: str, model: Callable[[], nn.Module], loss: object, make: Make, steps: int = 200
) -> Task:
    given = partial(batches, make), partial(held_out, make)
    return Task(part, model, *given, loss, batch=BATCH, steps=steps)


TASKS: dict[str, Task] = {
    "T5": task("development", lambda: T5(WIDTH, TOKENS, LENGTH), missing_span, cut),
    "GPT": task("development", gpt, next_character, plain),
    "LSTM": task("development", lambda: LSTM(WIDTH, TOKENS), next_character, plain),
    "Llama": task("held out", lambda: Llama(WIDTH, 2, TOKENS), next_character, plain),
    "mixture of experts": task(
        "held out", lambda: MixtureOfExperts(WIDTH, TOKENS, LENGTH), next_character, plain, 150
    ),
    "BERT": task(
        "held out", lambda: BERT(WIDTH, 2, TOKENS, LENGTH), masked_characters, masked, 150
    ),
    "LoRA": task("held out", lambda: with_adapters(pretrained(), 8), next_character, shouted, 150),
}
