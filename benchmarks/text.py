"""Text that ships with Python, character by character."""

from __future__ import annotations

from functools import cache
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from torch import Tensor


class Text(NamedTuple):
    """Characters as numbers, ``[N]``, and how many there are."""

    train: Tensor
    held_out: dict[str, Tensor]
    vocabulary: int


@cache
def python_topics() -> Text:
    """Python's built-in help on its language: 465,000 characters; the last tenth is the test."""
    text = "".join(topics[name] for name in sorted(topics))
    place = {character: i for i, character in enumerate(sorted(set(text)))}
    numbers = torch.tensor([place[character] for character in text])
    tenth = len(numbers) // 10
    train, validation, test = numbers.split([len(numbers) - 2 * tenth, tenth, tenth])
    return Text(train, {"validation": validation, "test": test}, len(place))
