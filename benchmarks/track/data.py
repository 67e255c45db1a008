"""What is fixed, and where tokens come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MAGIC, HEADER = 20240520, 256  # of a shard: 256 numbers of 32 bits, then tokens of 16
TARGET = 3.28  # nats


@dataclass(frozen=True)
class Track:
    """What is fixed; tokens are those of all ranks together."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    vocabulary: int = 50304  # 50257, to a multiple of 128
    length: int = 1024
    batch: int = 524_288  # tokens
    validation: int = 10_485_760  # tokens
    every: int = 125  # steps between two validations
    steps: int = 6200
    rows: int = 32  # in one pass of one rank


SMALL = Track(32, 2, 4, 64, 16, 128, 128, 2, 6, 4)


def shard(path: Path) -> np.ndarray:
    """The tokens of a file, read where they are used.

    Raises:
        ValueError: If it is no shard of tokens.
    """
    head = np.fromfile(path, dtype=np.int32, count=HEADER)
    if len(head) < HEADER or head[0] != MAGIC or head[1] != 1:
        raise ValueError(f"{path}: expected a shard of tokens with magic number {MAGIC}, version 1")
    tokens = np.memmap(path, dtype=np.uint16, mode="r", offset=4 * HEADER)
    if len(tokens) < head[2]:
        raise ValueError(f"{path}: expected {head[2]} tokens, got {len(tokens)}")
    return tokens[: head[2]]


def batches(data: Path, kind: str, track: Track, rank: int, ranks: int) -> Iterator[Tensor]:
    """This rank's rows ``[rows, length + 1]``, pass by pass, over all shards again and again."""
    paths = sorted(data.glob(f"*{kind}*.bin"))
    if not paths:
        raise ValueError(f"{data}: expected files *{kind}*.bin, got none")
    size = track.rows * track.length
    while True:
        for path in paths:
            tokens = shard(path)
            for start in range(rank * size, len(tokens) - size, ranks * size):
                piece = torch.from_numpy(tokens[start : start + size + 1].astype(np.int64))
                yield piece.unfold(0, track.length + 1, track.length)
