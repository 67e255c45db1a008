"""What a training step costs: bytes counted exactly, processor time from interleaved runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from benchmarks.data import load
from benchmarks.peak import PeakBytes
from benchmarks.training import backward, batches, build

BLOCK = 10  # steps timed together: factors move at every T-th step only
STATE_STEPS = 2  # after which every optimizer has all its state


@dataclass
class Cost:
    """Of one method on one model."""

    state: float = 0.0  # bytes of the optimizer's state, relative to the weights
    memory: float = 0.0  # peak bytes of a step, relative to SGD
    milliseconds: float = 0.0  # per step
    time: float = 0.0  # relative to SGD


def peak_bytes(model: nn.Module, optimizer: Optimizer, data: Iterator[Any]) -> int:
    """Of one step in which factors move: weights, gradients, state, activations, temporaries."""
    with PeakBytes() as count:
        count.add(model.parameters())
        count.add(tree_leaves(list(optimizer.state.values())))
        for _ in range(BLOCK):
            optimizer.zero_grad()
            backward(model, *next(data))
            optimizer.step()
    return count.peak


def state_bytes(optimizer: Optimizer) -> int:
    leaves = tree_leaves(list(optimizer.state.values()))
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))


def measure(
    model_name: str,
    precision: str,
    methods: dict[str, Callable[[nn.Module], Optimizer]],
    *,
    rounds: int,
) -> dict[str, Cost]:
    """Costs of all methods, the first being the one that others are relative to.

    The methods take turns, a block of steps each, so that noise of the machine meets all of them;
    ratios are medians over rounds.
    """
    data = batches(load("demo")[0], (rounds + 2) * BLOCK * len(methods), seed=0)
    models = {name: build(model_name, precision, seed=0) for name in methods}
    optimizers = {name: make(models[name]) for name, make in methods.items()}
    peaks, costs = {}, {}
    for name, model in models.items():
        block_seconds(model, optimizers[name], data, STATE_STEPS)
        weights = sum(p.nbytes for p in model.parameters())
        costs[name] = Cost(state=state_bytes(optimizers[name]) / weights)
        peaks[name] = peak_bytes(model, optimizers[name], data)
    seconds = {name: [] for name in methods}
    for _ in range(rounds):
        for name, model in models.items():
            seconds[name].append(block_seconds(model, optimizers[name], data, BLOCK))
    first = next(iter(methods))
    for name, cost in costs.items():
        cost.memory = peaks[name] / peaks[first]
        cost.milliseconds = 1e3 * median(seconds[name]) / BLOCK
        ratios = [a / b for a, b in zip(seconds[name], seconds[first], strict=True)]
        cost.time = median(ratios)
    return costs


def block_seconds(model: nn.Module, optimizer: Optimizer, data: Iterator[Any], steps: int) -> float:
    """Processor time, of one thread: what else the machine does is left out."""
    started = time.process_time()
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model, *next(data))
        optimizer.step()
    return time.process_time() - started
