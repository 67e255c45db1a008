"""How many samples the model is called with: one number N for all layers of a backward pass.

A layer's own first dimension may be a sequence, windows, or the rows that a router sent to it. The
number of samples is the model's. It is looked for, in this order, in

1. what attention and recurrent modules know by their ``batch_first``, where the model's input has
   a dimension of that size,
2. the first dimension of the model's input, where some layer was called with as many,
3. what attention and recurrent modules know,
4. the mean that a softmax cross-entropy takes, where parts of the model are called one by one.

If it is not found, every layer counts its own first dimension.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from singd.capture.transient import attach_before


class Call:
    """What is known of one call of the model.

    Args:
        sizes: Dimensions of the model's first input; empty if its parts are called one by one.
    """

    def __init__(self, sizes: tuple[int, ...] = ()) -> None:
        self.sizes = sizes
        self.told: Counter[int] = Counter()  # by modules that know
        self.firsts: set[int] = set()  # first dimensions of the inputs of layers
        self.rows = 0  # largest number of rows of a layer
        self.loss_terms: int | None = None

    def use(self, x: Tensor) -> None:
        """Take in the input of a layer, ``[..., d]``."""
        if x.ndim > 1:
            self.firsts.add(x.shape[0])
            self.rows = max(self.rows, x.shape[:-1].numel())

    @property
    def samples(self) -> int | None:
        """N, or ``None`` if it is not known."""
        known = [n for n, _ in self.told.most_common()]
        within = [n for n in known if n in self.sizes]
        if within:
            return within[0]
        if self.sizes and self.sizes[0] in self.firsts:
            return self.sizes[0]
        return known[0] if known else self.loss_terms


class Calls:
    """The call of the model that is under way, by hooks on the model and on modules that know N.

    Args:
        model: Model that is trained.
    """

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
            first = next(_tensors([*args, *kwargs.values()]), None)
            if first is None:
                self.current = Call()
            else:
                self.current = Call(tuple(first.shape[: first.ndim - first.is_floating_point()]))
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
