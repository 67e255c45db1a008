"""Operators of a step on a GPU, counted without one.

    python -m benchmarks.launches --models vgg16 --dtypes bf16

Each costs the host some 5 us at least, whatever it computes. Steps run on PyTorch's fake tensors
(:mod:`benchmarks.fake_cuda`), so models may be as large as they are. Counted are the statistics of
one pass, the step that updates the factors, and one that does not; ``foreach`` operators and
kernels count once. Copies between host and device are counted too, of the three together. Results
go to ``launches.csv``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import optimizers
from benchmarks.fake_cuda import backward, gpu, move, shapes
from benchmarks.nets import BATCHES, DTYPES, MODELS
from benchmarks.results import RESULTS, Row, keep

KEY = ("model", "dtype", "method")
METHODS = ("kfac", *optimizers.OURS)


def count(model_name: str, dtype: str, method: str) -> Row:
    """The row of one case."""
    with torch.device("meta"):
        model = MODELS[model_name]()
        x, _ = BATCHES[model_name]()
        seen = shapes(model, x)
    counts = []
    with gpu() as operators:
        move(model, DTYPES[dtype])
        optimizer = optimizers.make(method, model, T=2)
        for _ in range(4):
            operators.operators = 0
            operators.found.clear()
            backward(optimizer, seen, DTYPES[dtype])
            captured = operators.operators
            optimizer._parts.skipping.forget()  # or it would be read
            optimizer.step()
            counts.append((captured, operators.operators - captured, len(operators.found)))
    (statistics, update, copies), (unwanted, plain, also) = counts[-2:]
    numbers = {
        "statistics": statistics - unwanted,
        "step with update": update,
        "plain step": plain,
        "copies": copies + also,
    }
    return dict(zip(KEY, (model_name, dtype, method), strict=True)) | {
        name: str(number) for name, number in numbers.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.launches", description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="mlp,gpt,vit,vgg16")
    parser.add_argument("--dtypes", default="bf16")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--out", type=Path, default=RESULTS / "launches.csv")
    args = parser.parse_args(argv)
    for model in args.models.split(","):
        for dtype in args.dtypes.split(","):
            for method in args.methods.split(","):
                row = count(model, dtype, method)
                keep(args.out, [row], KEY)
                print(*(value.ljust(12) for value in row.values()), flush=True)


if __name__ == "__main__":
    main()
