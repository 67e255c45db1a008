"""How many samples the model is called with: one number N for all layers of a backward pass.

A layer's own first dimension may be a sequence, windows, or the rows that a router sent to it. The
number of samples is the model's. It is looked for, in this order, in

1. what attention and recurrent modules know by their ``batch_first``, where the model's input has
   a dimension of that size,
2. the first dimension of one of the model's inputs, where some layer was called with as many,
3. that of its first input, where a layer was called with as many in second place (sequence first),
4. what attention and recurrent modules know,
5. the mean that a softmax cross-entropy takes, where parts of the model are called one by one.

If it is not found, every layer counts its own first dimension.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from singd.capture.transient import attach_before


class Call:
    """What is known of one call of the model.

    Args:
        inputs: Dimensions of each of the model's inputs; empty if its parts are called one by one.
    """

    def __init__(self, inputs: Sequence[tuple[int, ...]] = ()) -> None:
        inputs = [sizes for sizes in inputs if sizes]
        self.sizes = inputs[0] if inputs else ()
        firsts = [sizes[0] for sizes in inputs]
        self._candidates = sorted(firsts, key=lambda n: n == 1)  # what is one is often broadcast
        self.told: Counter[int] = Counter()  # by modules that know
        self.firsts: set[int] = set()  # first dimensions of the inputs of layers
        self.seconds: set[int] = set()  # second dimensions, of sequences
        self.rows = 0  # largest number of rows of a layer
        self.loss_terms: int | None = None

    def use(self, x: Tensor) -> None:
        """Take in the input of a layer, ``[..., d]``."""
        if x.ndim > 1:
            self.firsts.add(x.shape[0])
            self.seconds.update(x.shape[1:-1][:1])
            self.rows = max(self.rows, x.shape[:-1].numel())

    def use_images(self, x: Tensor) -> None:
        """Take in the input of a convolution, ``[N, channels, ...]``."""
        self.firsts.add(x.shape[0])

    @property
    def samples(self) -> int | None:
        """N, or ``None`` if it is not known."""
        known = [n for n, _ in self.told.most_common()] if self.told else []
        within = [n for n in known if n in self.sizes]
        if within:
            return within[0]
        for n in self._candidates:
            if n in self.firsts:
                return n
        for n in self.sizes[:1]:
            if n in self.seconds:
                return n
        return known[0] if known else self.loss_terms


class Calls:
    """The call of the model that is under way, by hooks on the model and on modules that know N."""

    def __init__(self, model: nn.Module) -> None:
        self.current = Call()
        self.handles = [attach_before(model, self._begin)]
        for module in model.modules():
            if isinstance(module, nn.MultiheadAttention | nn.RNNBase) and module is not model:
                self.handles.append(attach_before(module, self._tell))

    def end(self) -> None:
        """A backward pass is over: parts of the model that are called next are another call."""
        if not self.current.sizes:
            self.current = Call()

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            given = _tensors([*args, *kwargs.values()])
            inputs = [tuple(x.shape[: x.ndim - x.is_floating_point()]) for x in given]
            self.current = Call(inputs)
            if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
                self._tell(module, args, kwargs)

    def _tell(self, module: Any, args: Any, kwargs: Any) -> None:
        x = next(_tensors([*args, *kwargs.values()]), None)
        if x is not None and x.ndim == 3 and torch.is_grad_enabled():
            self.current.told[x.shape[0 if module.batch_first else 1]] += 1


def is_dense(value: Any) -> bool:
    """Whether it is a tensor with all its numbers, side by side."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors with dimensions in nested arguments."""
    for value in values:
        if isinstance(value, Tensor):
            if is_dense(value) and value.ndim:
                yield value
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
        elif is_dataclass(value) and not isinstance(value, type):
            yield from _tensors(vars(value).values())
