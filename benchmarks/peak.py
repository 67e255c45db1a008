"""Bytes of tensors, counted one by one."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """The most bytes alive at once in tensors that operations made or that were :meth:`add`-ed.

    A storage counts once, however many tensors view it, from its first tensor until it is freed.
    Scratch memory inside an operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0  # ``largest``: the most that one operation made
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def restart(self) -> None:
        """Forget the peak and the largest operation so far, not what is alive."""
        self.peak, self.largest = self.now, 0

    def add(self, tensors: Iterable[Any]) -> int:
        """Count the storages of ``tensors`` that are new; their bytes."""
        before = self.now
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage not in self._seen:
                self._seen.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return self.now - before

    def _free(self, count: int) -> None:
        self.now -= count

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.largest = max(self.largest, self.add(tree_leaves(out)))
        return out
